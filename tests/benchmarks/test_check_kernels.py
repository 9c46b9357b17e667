"""What the compile check calls a fault, and that the committed table has none and covers every shipped kernel."""

import json
from importlib import import_module

import pytest

from benchmarks import check_kernels

GOOD = {
    "op": "token_pack",
    "kernel": "pack_kernel",
    "label": "bf16",
    "config": {},
    "sm": 80,
    "registers": 32,
    "stack": 0,
    "shared": 1024,
    "matrix": "mma.sync",
    "tf32": False,
    "wants_matrix": True,
    "wants_tf32": False,
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 164 * 1024}, "shared memory"),
        ({"shared": 200 * 1024, "sm": 90}, None),
        ({"shared": 228 * 1024, "sm": 90}, "shared memory"),
        ({"matrix": ""}, "no matrix instruction"),
        ({"matrix": "", "wants_matrix": False}, None),
        ({"tf32": True}, "tf32 that was not asked for"),
        ({"tf32": True, "wants_tf32": True}, None),
        ({"registers": 41}, "41 registers, 32 committed"),
        ({"registers": 40}, None),
    ],
)
def test_faults(change, fault):
    found = check_kernels.faults({**GOOD, **change}, GOOD)
    assert (not found) if fault is None else (len(found) == 1 and fault in found[0])


def test_the_committed_table_is_clean_and_complete():
    rows = json.loads(check_kernels.COMMITTED.read_text())
    assert not [check_kernels.faults(row, row) for row in rows if check_kernels.faults(row, row)]
    committed = {check_kernels.key(row) for row in rows}
    for module in check_kernels.modules():
        for specimen in import_module(module).specimens():
            for config, _, _ in specimen.compilations():
                for sm in (80, 90):
                    row = {"op": specimen.op, "kernel": specimen.kernel.__name__, "label": specimen.label}
                    assert check_kernels.key({**row, "config": config, "sm": sm}) in committed, (row, config)
    assert {row["op"] for row in rows if row["label"].endswith(".cu")} >= {"image", "pack"}
    page = check_kernels.PAGE.read_text()
    assert page.count("\n| ") >= len(rows)


def test_every_kernel_has_a_specimen_and_every_table_entry_a_kernel():
    from llava_fast.ops import triton_support

    kernels = set()
    for module in check_kernels.modules():
        kernels |= {specimen.kernel.__name__ for specimen in import_module(module).specimens()}
    tables = set(triton_support.table("default"))
    assert {name.removesuffix("_fp32").removesuffix("_rows") for name in tables} <= {
        name.removesuffix("_fp32").removesuffix("_rows") for name in kernels
    }
