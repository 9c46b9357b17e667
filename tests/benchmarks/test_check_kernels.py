"""What the compile check calls a fault, and that the committed table has none and covers every shipped kernel."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
import typer

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
    "serial": False,
    "tf32": False,
    "wants_matrix": True,
    "wants_tf32": False,
    "source": "",
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
        ({"serial": True}, "wait for one another"),
        ({"tf32": True}, "tf32 that was not asked for"),
        ({"tf32": True, "wants_tf32": True}, None),
        ({"registers": 41}, "41 registers, 32 committed"),
        ({"registers": 40}, None),
    ],
)
def test_faults(change, fault):
    """Whatever was committed: here the same shared memory and matrix instruction, which alone say nothing."""
    row = {**GOOD, **change}
    found = check_kernels.faults(row, {**row, "registers": 32})
    assert (not found) if fault is None else (len(found) == 1 and fault in found[0])


WGMMA = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 out)
{
    .reg .f32 %f<5>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [out];
    mov.b64 %rd2, 0;
    mov.b64 %rd3, 0;
    mov.f32 %f1, 0f00000000;
    mov.f32 %f2, 0f00000000;
    mov.f32 %f3, 0f00000000;
    mov.f32 %f4, 0f00000000;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %rd2, %rd3, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    BETWEEN
    wgmma.wait_group.sync.aligned 0;
    st.global.v4.f32 [%rd1], {%f1, %f2, %f3, %f4};
    ret;
}
"""


WRITTEN_IN_FLIGHT = """
    mov.f32 %f1, 0f3f800000;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %rd2, %rd3, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
"""


@pytest.mark.parametrize(("between", "serial"), [("", False), (WRITTEN_IN_FLIGHT, True)])
def test_products_that_wait_for_one_another_are_seen(between, serial):
    assert check_kernels.is_serial(WGMMA.replace("BETWEEN", between), 90) is serial
    assert not check_kernels.is_serial("mma.sync", 80)


@pytest.mark.parametrize(
    ("committed", "found", "fault"),
    [
        ({}, {"shared": 1040}, "1040 bytes of shared memory, 1024 committed"),
        ({}, {"shared": 1008, "registers": 20}, None),
        ({"sm": 90, "matrix": "wgmma.mma_async"}, {"sm": 90}, "mma.sync, wgmma.mma_async committed"),
        ({"sm": 90}, {"sm": 90, "matrix": "wgmma.mma_async"}, None),
        ({"wants_matrix": False}, {"wants_matrix": False, "matrix": ""}, "no matrix instruction, mma.sync committed"),
        ({"wants_matrix": False, "matrix": ""}, {"wants_matrix": False, "matrix": ""}, None),
        ({"label": "fp16"}, {}, "not in the committed table"),
    ],
)
def test_what_is_worse_than_the_committed_table(committed, found, fault):
    lines = check_kernels.judge([{**GOOD, **found}], [{**GOOD, **committed}])
    assert (not lines) if fault is None else ((len(lines) == 1 and lines[0].endswith(fault)) or fault in lines[0])
    assert not check_kernels.judge([{**GOOD, **found}], None)  # as --write does


def test_without_nvcc_csrc_is_left_out_only_where_that_is_allowed(monkeypatch, capsys):
    monkeypatch.setattr(check_kernels.shutil, "which", lambda name: None)
    with pytest.raises(typer.BadParameter, match=r"nvcc is not on PATH.*--allow-missing-nvcc"):
        check_kernels.main(only="image")
    assert check_kernels.cuda_sources("image", allow_missing_nvcc=True) == []
    assert "CUDA sources of csrc are not compiled" in capsys.readouterr().out
    assert check_kernels.cuda_sources("layer_norm") == []  # it has none
    monkeypatch.setattr(check_kernels.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert [path.parent.name for path in check_kernels.cuda_sources("image")] == ["image"]


def test_a_table_of_some_kernels_is_not_written():
    for given in ({"only": "image"}, {"allow_missing_nvcc": True}):
        with pytest.raises(typer.BadParameter, match="--write makes the whole table"):
            check_kernels.main(write=True, **given)


def test_the_committed_table_is_clean_and_complete():
    rows = json.loads(check_kernels.COMMITTED.read_text())
    assert not [check_kernels.faults(row, row) for row in rows if check_kernels.faults(row, row)]
    committed = {check_kernels.key(row) for row in rows}
    assert len(committed) == len(rows)
    for module in check_kernels.modules():
        for specimen in import_module(module).specimens():
            for config, _, _ in specimen.compilations():
                for sm in (80, 90):
                    row = {"op": specimen.op, "kernel": specimen.kernel.__name__, "label": specimen.label}
                    assert check_kernels.key({**row, "config": config, "sm": sm}) in committed, (row, config)
    assert {row["op"] for row in rows if row["label"].endswith(".cu")} >= {"image", "pack"}
    page = check_kernels.PAGE.read_text()
    versions = re.search(r"WRITE=1` with (.*)\. Compiled", page)[1]
    assert page == check_kernels.markdown(rows, versions)


def test_every_kernel_has_a_specimen_and_every_table_entry_a_kernel():
    from llava_fast.ops import triton_support

    kernels = set()
    for module in check_kernels.modules():
        kernels |= {specimen.kernel.__name__ for specimen in import_module(module).specimens()}
    tables = set(triton_support.table("default"))
    assert {name.removesuffix("_fp32").removesuffix("_rows") for name in tables} <= {
        name.removesuffix("_fp32").removesuffix("_rows") for name in kernels
    }


KNOWN = """
import sys, triton
from benchmarks import check_kernels

made = []
triton.compile = lambda *args, **options: made.append(1)
check_kernels.compiled = lambda made, capability: dict.fromkeys(check_kernels.COMPILED, capability)
compile_one = lambda known: check_kernels.compile_triton("llava_fast.ops.token_pack.triton_kernels", 0, known)
rows = compile_one({})
known, first = {row["source"]: row for row in rows}, len(made)
assert first == len(known) == len(rows) > 1
if sys.argv[1] == "compiler":
    triton.__version__ = "0.0.0"
again = compile_one(known)
assert [row["registers"] for row in again] == [row["sm"] for row in rows]
sys.exit(0 if len(made) == first and again == rows else 3)
"""


@pytest.mark.parametrize(("what", "status"), [("known", 0), ("compiler", 3)])
def test_only_what_is_known_of_this_compiler_is_not_compiled(what, status):
    """In a process of its own: here kernels are interpreted, and have no identity."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", KNOWN, what], env=environment, cwd=check_kernels.ROOT, check=False)
    assert done.returncode == status
