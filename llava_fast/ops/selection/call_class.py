"""The class of a call. All calls of a class run the same code on data of similar size, so they share one verdict.

A class is one line of text: the operator, each tensor's dtype and sizes, and every other argument that changes the
code.

    linear_act x=bf16[4096,1024] weight=bf16[4096,1024] bias=bf16[4096] activation=quick_gelu keep=0

Sizes are rounded up to powers of two. "~" marks rows whose width is not a multiple of 16 (kernels then use narrower
loads and stores), "*" a tensor that is not contiguous. Several leading dimensions of rows are merged into one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8",
}


def signature(args: Sequence[Any]) -> tuple:
    """A hashable key of the arguments' exact properties: calls with equal keys belong to the same class."""
    return tuple(map(_part, args))


def _part(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.dtype, arg.shape, arg.is_contiguous()
    if isinstance(arg, list):
        return tuple(map(_part, arg))
    return float if isinstance(arg, float) else arg


def call_class(operator: str, args: Sequence[Any], row_args: Sequence[str] = (), ignored: Sequence[str] = ()) -> str:
    """The class of a call of `operator` (a name in the "llava_fast" library). row_args: arguments whose leading
    dimensions are all rows; ignored: arguments that are left out."""
    words = [operator]
    for name, arg in zip(argument_names(operator), args, strict=False):
        if name in ignored:
            continue
        if isinstance(arg, Tensor):
            words.append(f"{name}={_tensor(arg, name in row_args)}")
        elif isinstance(arg, list) and arg and not isinstance(arg[0], Tensor):
            words.append(f"{name}={','.join(map(_value, arg))}")
        elif isinstance(arg, list) and arg and arg[0].is_floating_point():
            words.append(f"{name}={';'.join(_tensor(each, name in row_args) for each in arg)}")
        elif isinstance(arg, list) and arg:
            words.append(f"{name}={len(arg)}")  # an inverse placement: its sizes differ from call to call
        elif arg is not None and not isinstance(arg, (float, list)):
            words.append(f"{name}={_value(arg)}")
    return " ".join(words)


@functools.cache
def argument_names(operator: str) -> tuple[str, ...]:
    """The names of an operator's arguments, in order."""
    schema = getattr(torch.ops.llava_fast, operator).default._schema
    return tuple(argument.name for argument in schema.arguments)


@functools.cache
def written_arguments(operator: str) -> tuple[int, ...]:
    """The indices of the arguments that an operator writes to."""
    arguments = getattr(torch.ops.llava_fast, operator).default._schema.arguments
    return tuple(i for i, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write)


def _tensor(tensor: Tensor, is_rows: bool) -> str:
    shape = tuple(tensor.shape)
    if is_rows and len(shape) > 2:
        shape = (tensor.shape[:-1].numel(), shape[-1])
    sizes = ",".join(str(_bucket(size)) for size in shape)
    ragged = "~" if len(shape) > 1 and shape[-1] % 16 else ""
    return f"{NAMES.get(tensor.dtype, tensor.dtype)}[{sizes}]{ragged}{'' if tensor.is_contiguous() else '*'}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int):
        return str(_bucket(value))
    return NAMES.get(value, str(value)) if isinstance(value, torch.dtype) else str(value)


def _bucket(size: int) -> int:
    return 1 << (size - 1).bit_length() if size > 0 else size
