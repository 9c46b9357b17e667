"""The class of a call: all calls of one class run the same code on data of about one size, so one verdict serves them.

A class is one line of text: the operator, then each tensor's dtype and sizes, then what else changes the code.

    linear_act x=bf16[4096,1024] weight=bf16[4096,1024] bias=bf16[4096] activation=quick_gelu keep=0

Sizes are rounded up to powers of two. Rows whose width is no multiple of 16 are marked "~" (kernels then load and store
narrower), a tensor that is not contiguous "*". Rows that lie in several leading dimensions are counted as one.
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
}


def signature(args: Sequence[Any]) -> tuple:
    """What of a call's arguments its class is made of, exact and hashable; calls that agree in it are of one class."""
    return tuple(map(_part, args))


def _part(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.dtype, arg.shape, arg.is_contiguous()
    if isinstance(arg, list):
        return tuple(map(_part, arg))
    return float if isinstance(arg, float) else arg


def call_class(operator: str, args: Sequence[Any], row_args: Sequence[str] = (), ignored: Sequence[str] = ()) -> str:
    """The class of a call of `operator` (a name in the "llava_fast" library). `row_args` names the arguments whose
    leading dimensions are all rows, `ignored` those that are no part of it."""
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
            words.append(f"{name}={len(arg)}")  # an inverse placement, whose parts differ from call to call
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
    """Which of an operator's arguments, by number, it writes to."""
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
