"""Shared by the Triton kernels: whether they can run here, launch configurations, specimens for the compile check.

Launch configurations are data in `tuned/`: one JSON table per kind of GPU ("default.json" for kinds without
measurements) gives a kernel's first choice, "candidates.json" what else selection tries. Selection tests a
configuration on the machine before it is used.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from llava_fast.ops.selection.candidates import configurations
from llava_fast.ops.selection.decision import current

KINDS = ("A100", "H100", "H200")
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.uint8: "u8"}

Config = dict[str, int]
OPTIONS: Config = {"enable_fp_fusion": True}
"""Compiler options of every launch: a product and the sum after it become one fma. That was Triton's default; 3.9 warns
if nothing is said, 3.10 is to fuse nothing (triton-lang/triton#11270). The compile check's hashes leave them out."""
_forced: dict[str, Config] = {}


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), which takes CPU tensors."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def upcast(like: Tensor) -> bool:
    """Whether a kernel must convert the operands of a product to float32: the interpreter's bfloat16 dot is wrong."""
    return like.dtype == torch.bfloat16 and interpreting()


def unfit(*tensors: Tensor | None) -> str | None:
    """Why Triton kernels do not support these tensors; None if they do."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreting()):
            return f"a tensor is on {tensor.device}, and Triton kernels run on CUDA (or with TRITON_INTERPRET=1)"
        if tensor.dtype not in DTYPES and tensor.dtype != torch.int64:
            return f"{tensor.dtype} is not one of its dtypes ({', '.join(DTYPES.values())})"
    return None


def unequal(*tensors: Tensor) -> str | None:
    """Why a Triton kernel that needs tensors of one dtype does not support these; None if it does."""
    dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
    return f"its tensors' dtypes differ: {', '.join(map(str, dtypes))}" if len(dtypes) > 1 else None


@functools.cache
def device_kind(device: torch.device) -> str:
    """The name of a device's table: "a100", "h100" or "h200" by the GPU's name, else "default"."""
    if device.type != "cuda":
        return "default"
    name = torch.cuda.get_device_name(device)
    return next((kind.lower() for kind in KINDS if kind in name), "default")


def config(kernel: str, device: torch.device, rows: int) -> Config:
    """The launch configuration of `kernel` for this number of rows, with OPTIONS: selection's decision for the running
    operator, else the table's entry with the largest `rows` that is not above the number."""
    if kernel in _forced:
        return OPTIONS | _forced[kernel]
    decision = current()
    if decision is not None and kernel in decision.configs:
        return OPTIONS | dict(decision.configs[kernel])
    found = _entry(kernel, device_kind(device), rows.bit_length() if rows > 0 else 0)
    if decision is not None and decision.is_trial:
        decision.kernels[kernel] = dict(found)
    return OPTIONS | found


@contextlib.contextmanager
def forced(configs: dict[str, Config]) -> Iterator[None]:
    """Inside the block, run these kernels with these configurations: for tuning, and for tests with small blocks."""
    before = dict(_forced)
    _forced.update(configs)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@functools.cache
def _entry(kernel: str, kind: str, bits: int) -> Config:
    entries = table(kind).get(kernel) or table("default")[kernel]
    fitting = [entry for entry in entries if entry["rows"].bit_length() <= bits] or entries[:1]
    return fitting[-1]["config"]


@functools.cache
def table(kind: str) -> dict[str, list[dict[str, Any]]]:
    """Kernel -> [{"rows": least number of rows (a power of two or 0), "config": {...}}], sorted by rows."""
    path = files("llava_fast.ops") / "tuned" / f"{kind}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def shipped_configs(kernel: str) -> list[Config]:
    """Every distinct configuration of `kernel` in any table."""
    found: list[Config] = []
    for kind in ("default", *(kind.lower() for kind in KINDS)):
        for entry in table(kind).get(kernel, []):
            if entry["config"] not in found:
                found.append(entry["config"])
    return found


@dataclass(frozen=True)
class Specimen:
    """One way a kernel is compiled, for `make check-kernels`.

    signature: argument name -> Triton type ("*bf16", "i32", ...) of the run-time arguments; constants: name -> value
    of the constexpr arguments, except those of the launch configuration. matrix: it must use tensor cores; tf32: it may
    use tf32. entry: the name of its configurations in the tables, by default the kernel's.
    """

    op: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    label: str = ""
    matrix: bool = False
    tf32: bool = False
    aligned: tuple[str, ...] = field(default=())
    entry: str = ""

    def compilations(self) -> Iterator[tuple[Config, dict[str, Any], dict[str, int]]]:
        """(launch configuration, all constants, compiler options) for every shipped configuration; in bfloat16 also for
        every other one that selection may try."""
        entry = self.entry or self.kernel.__name__
        shipped = shipped_configs(entry)
        listed = configurations().get(entry, []) if self.label.startswith("bf16") else []
        for found in [*shipped, *(config for config in listed if config not in shipped)]:
            options: dict[str, int] = {name: found[name] for name in ("num_warps", "num_stages") if name in found}
            constants = {name: value for name, value in found.items() if name not in options}
            yield dict(found), {**self.constants, **constants}, options
