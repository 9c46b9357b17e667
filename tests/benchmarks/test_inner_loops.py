"""The inner loop of a matrix kernel as read from SASS, what makes one worse, and the estimate of its bound."""

import json
import re

import pytest

from benchmarks import check_kernels, inner_loops

SASS = """
        Function : kernel
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;   /* 0x00000a00ff017624 */
        /*0010*/                   LDG.E R4, [R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R9], [R2.64] ;
        /*0030*/                   LDSM.16.M88.4 R8, [R7] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/                   LDGSTS.E.64 [R9+0x800], [R2.64] ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   NOP ;
        /*0080*/              @!P0 BRA 0x20 ;
        /*0090*/               @P1 BRA 0x10 ;
        /*00a0*/                   STG.E [R2.64], R4 ;
        /*00b0*/                   BRA 0xb0;
"""
LOOP = {
    "matrix": 2,
    "shape": "HMMA.16816.F32.BF16",
    "others": 4,
    "asyncs": 2,
    "loads": 0,
    "narrowest": 8,
    "bytes": 384.0,
}


def test_the_innermost_loop_is_read():
    assert inner_loops.inner_loop(SASS) == LOOP
    assert inner_loops.inner_loop(SASS.replace("HMMA", "FFMA")) is None
    assert inner_loops.inner_loop("") is None
    through_registers = inner_loops.inner_loop(SASS.replace("LDGSTS.E.64 [R9+0x800],", "LDG.E.U16 R3,"))
    assert through_registers == {**LOOP, "asyncs": 1, "loads": 1, "narrowest": 2, "bytes": 288.0}
    by_tma = SASS.replace("LDGSTS.E.BYPASS.LTC128B.128", "UTMALDG.2D").replace("LDGSTS.E.64", "UTMALDG.2D")
    assert inner_loops.inner_loop(by_tma) == {**LOOP, "narrowest": None, "bytes": 0.0}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"others": 5}, "2.50 other instructions a matrix instruction in the inner loop, 2.00 committed"),
        ({"others": 8, "matrix": 4, "asyncs": 4}, None),
        ({"bytes": 512.0}, "512.00 bytes a matrix instruction"),
        ({"asyncs": 0, "loads": 2}, "0 asynchronous copies in the inner loop, 2 committed"),
        ({"asyncs": 1}, None),
        ({"narrowest": 2}, "loads of 2 bytes in the inner loop, 8 committed"),
        ({"narrowest": None}, None),
    ],
)
def test_a_worse_loop_is_a_fault(change, fault):
    found = inner_loops.faults({**LOOP, **change}, LOOP)
    assert (not found) if fault is None else (len(found) == 1 and fault in found[0])


def test_the_gate_asks_for_it():
    row = {"op": "x", "kernel": "k", "label": "", "config": {}, "sm": 80, "registers": 32, "stack": 0, "shared": 0}
    row |= {"matrix": "mma.sync", "serial": False, "tf32": False, "wants_matrix": True, "wants_tf32": False}
    worse = {**LOOP, "others": 9}
    assert not check_kernels.judge([{**row, "loop": LOOP}], [{**row, "loop": LOOP}])
    (line,) = check_kernels.judge([{**row, "loop": worse}], [{**row, "loop": LOOP}])
    assert "other instructions" in line
    (line,) = check_kernels.judge([{**row, "loop": None}], [{**row, "loop": LOOP}])
    assert "no inner loop" in line


def test_the_bound_is_what_issue_slots_leave():
    """HMMA.16816 has 4096 operations: 8 cycles of a quarter of an A100's multiprocessor."""
    assert inner_loops.bound({**LOOP, "others": 14}, 80) == 1
    assert inner_loops.bound({**LOOP, "others": 30}, 80) == pytest.approx(16 / 32)
    # 64x128x16 has 262,144: 64 cycles of an H100's
    warp_group = {**LOOP, "shape": "HGMMA.64x128x16.F32.BF16", "matrix": 1, "others": 99}
    assert inner_loops.bound(warp_group, 90) == pytest.approx(64 / 100)
    assert inner_loops.bound({**LOOP, "shape": "HMMA.1688.F32.TF32", "others": 30}, 80) == pytest.approx(16 / 32)
    with pytest.raises(ValueError, match="no shape"):
        inner_loops.shape("HMMA.SP")


def test_the_committed_table_and_its_page():
    rows = json.loads(check_kernels.COMMITTED.read_text())
    assert all((row["loop"] is not None) == bool(row["matrix"]) for row in rows)
    page = check_kernels.BOUNDS.read_text()
    assert page == check_kernels.bounds_page(rows, re.search(r"disassembly of Triton (\S+) and", page)[1])


def test_blocks_of_a_multiprocessor():
    row = {"sm": 80, "registers": 128, "shared": 0, "config": {"num_warps": 4}}
    assert check_kernels.blocks(row) == 4
    assert check_kernels.blocks({**row, "registers": 32}) == 16
    assert check_kernels.blocks({**row, "shared": 60 * 1024}) == 2
