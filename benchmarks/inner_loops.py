"""What the inner loop of a matrix kernel issues, read from its disassembly, and the share of the matrix units' rate
that this allows at best: an estimate, not a measurement.

The inner loop is the shortest one (a branch backwards and what lies between) with the most matrix instructions. Its
numbers are per warp and iteration.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

MATRIX = ("HMMA", "IMMA", "DMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA")
WARP = 32
WORSE = 1.1  # times as many other issue slots, or bytes, a matrix instruction: what a compiler's patch may move
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)([^;]*);")


class Instruction(NamedTuple):
    address: int
    name: str  # with its modifiers
    operands: str

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]


def disassembled(cubin: bytes) -> str:
    """SASS of a cubin, by the disassembler in the Triton wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> list[Instruction]:
    return [Instruction(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(sass)]


def inner_loop(sass: str) -> dict | None:
    """What the inner loop of one function issues, or None without a loop of matrix instructions.

    matrix       matrix instructions; `shape` is the name of the most frequent one.
    others       all other instructions: issue slots that the matrix instructions share.
    asyncs       asynchronous copies to shared memory (LDGSTS, or TMA's UTMALDG and UBLKCP).
    loads        loads from global memory into registers.
    narrowest    bytes that a thread loads by the narrowest of both; None without any, or with TMA alone.
    bytes        bytes that a warp loads from global memory for each matrix instruction, TMA's not counted.
    """
    code = instructions(sass)
    place = {each.address: number for number, each in enumerate(code)}
    best: tuple[tuple[int, int], list[Instruction]] | None = None
    for number, each in enumerate(code):
        if each.kind != "BRA" or (target := re.search(r"0x([0-9a-f]+)", each.operands)) is None:
            continue
        first = place.get(int(target[1], 16))
        if first is None or first > number:
            continue
        body = code[first : number + 1]
        rank = sum(inside.kind in MATRIX for inside in body), -len(body)
        if rank[0] and (best is None or rank > best[0]):
            best = rank, body
    return None if best is None else _counted(best[1])


def _counted(body: list[Instruction]) -> dict:
    matrix = [each for each in body if each.kind in MATRIX]
    names = [each.name for each in matrix]
    loads = [each for each in body if each.kind in ("LDG", "LDGSTS")]
    widths = [width(each.name) for each in loads]
    tma = sum(each.kind in ("UTMALDG", "UBLKCP") for each in body)
    return {
        "matrix": len(matrix),
        "shape": max(sorted(set(names)), key=names.count),
        "others": sum(each.kind not in (*MATRIX, "NOP") for each in body),
        "asyncs": sum(each.kind == "LDGSTS" for each in loads) + tma,
        "loads": sum(each.kind == "LDG" for each in loads),
        "narrowest": min(widths, default=None),
        "bytes": round(WARP * sum(widths) / len(matrix), 1),
    }


def width(name: str) -> int:
    """Bytes that each thread loads."""
    parts = name.split(".")
    for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in parts:
            return size
    return 4


def faults(found: dict | None, committed: dict | None) -> list[str]:
    """How a loop is worse than the committed one, in words."""
    if committed is None:
        return []
    if found is None:
        return ["no inner loop with matrix instructions, one was committed"]
    wrong = []
    for name, what in (("others", "other instructions"), ("bytes", "bytes")):
        mine, theirs = (each[name] / (each["matrix"] if name == "others" else 1) for each in (found, committed))
        if mine > WORSE * theirs:
            wrong.append(f"{mine:.2f} {what} a matrix instruction in the inner loop, {theirs:.2f} committed")
    if found["asyncs"] < committed["asyncs"] and found["loads"] > committed["loads"]:
        wrong.append(f"{found['asyncs']} asynchronous copies in the inner loop, {committed['asyncs']} committed")
    if (found["narrowest"] or 16) < (committed["narrowest"] or 16):
        wrong.append(f"loads of {found['narrowest']} bytes in the inner loop, {committed['narrowest']} committed")
    return wrong


RATES = {80: 2048, 90: 4096}
"""Dense operations of 16-bit matrix units in a cycle of a multiprocessor: 312 Tflop/s of 108 at 1.41 GHz (NVIDIA A100
whitepaper), 989 Tflop/s of 132 at 1.83 GHz (H100 whitepaper); tf32 has half."""
SCHEDULERS = 4  # of a multiprocessor, each issuing one warp's instruction a cycle


def bound(loop: dict, sm: int) -> float:
    """The share of the matrix units' rate that the loop's issue slots allow: cycles that its matrix instructions keep
    the units busy, over those or the slots of all its instructions, whichever are more. A warp group's instruction
    (wgmma) keeps all four schedulers' units busy and is issued once by each of its four warps."""
    rows, columns, depth = shape(loop["shape"])
    operations = 2 * rows * columns * depth * loop["matrix"]
    rate = RATES[sm] / (2 if "TF32" in loop["shape"] else 1)
    busy = operations / (rate if loop["shape"].startswith("HGMMA") else rate / SCHEDULERS)
    return busy / max(busy, loop["matrix"] + loop["others"])


def shape(name: str) -> tuple[int, int, int]:
    """Rows, columns and depth of a matrix instruction: HMMA.16816.F32.BF16, HGMMA.64x128x16.F32.BF16."""
    if found := re.search(r"\.(\d+)x(\d+)x(\d+)", name):
        rows, columns, depth = map(int, found.groups())
        return rows, columns, depth
    digits = re.search(r"\.(16|8)(8|16)(4|8|16|32)(?:\.|$)", name)
    if digits is None:
        raise ValueError(f"no shape in {name}")
    rows, columns, depth = map(int, digits.groups())
    return rows, columns, depth
