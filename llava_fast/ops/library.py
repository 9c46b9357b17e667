"""Registers an op as a `torch.library` operator: one node for autograd, torch.compile and CUDA graphs.

Uses `Library.define` and `impl` because a call through the `custom_op` decorator costs several times as much. The
backend is chosen when the operator runs, so a compiled graph still follows `use_backend`; if no backend is requested,
selection decides (`ops/selection`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._ops import OpOverload

from llava_fast.ops import backend
from llava_fast.ops.selection import policy

LIBRARY = torch.library.Library("llava_fast", "FRAGMENT")


def define(
    schema: str,
    run: Callable,
    fake: Callable,
    backward: Callable | None = None,
    save: Callable | None = None,
) -> OpOverload:
    """Register `run` for every device under `schema` and return the callable `torch.ops.llava_fast.<name>.default`.

    The first argument must be a tensor; its GPU is the current device while `run` launches kernels. Tensors on
    different devices raise ValueError. `fake` returns empty outputs of the right shapes and dtypes. `save(ctx, inputs,
    output)` saves what `backward(ctx, *gradients)` needs; without these two the op has no gradient. A second derivative
    raises RuntimeError.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, on_its_device(name, selected(name, run)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"llava_fast::{name}", fake, lib=LIBRARY)
    if backward is not None:
        once = _first_derivative(name, backward)
        torch.library.register_autograd(f"llava_fast::{name}", once, setup_context=save, lib=LIBRARY)
    return getattr(torch.ops.llava_fast, name).default


def autocast(*tensors: Tensor | None) -> list[Tensor]:
    """Cast the tensors (None stays None) as autocast casts the operands of a matrix product.

    Operands are cast before the op is called; otherwise its forward and backward would multiply in different dtypes.
    """
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not torch.is_autocast_enabled(device):
        return list(tensors)  # type: ignore[arg-type]
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]  # type: ignore[misc]


def selected(name: str, run: Callable) -> Callable:
    """`run`, wrapped to follow selection's verdict if no backend is requested."""

    @functools.wraps(run)
    def by_verdict(*args):
        return policy.run(name, run, args) if backend.requested() == "auto" else run(*args)

    return by_verdict


def on_its_device(name: str, run: Callable) -> Callable:
    """`run`, wrapped to make its first argument's device the current one, on which Triton launches. Raises ValueError
    for tensors on different devices: kernels do not check addresses."""

    @functools.wraps(run)
    def on_device(first: Tensor, *rest):
        device = first.device
        for given in rest:
            for other in given if isinstance(given, list) else (given,):
                if isinstance(other, Tensor) and other.device != device:
                    raise ValueError(f"{name}: its tensors are on {device} and {other.device}: move them to one device")
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return run(first, *rest)
        with torch.cuda.device(device):
            return run(first, *rest)

    return on_device


def _first_derivative(name: str, backward: Callable) -> Callable:
    """`backward`, wrapped so that differentiating its results again (create_graph=True) raises RuntimeError."""

    def once(ctx, *grads):
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        return tuple(last(one) for one in found)

    def last(found):
        if isinstance(found, list):
            return [last(one) for one in found]
        return _Last.apply(found.detach().requires_grad_(), name) if isinstance(found, Tensor) else found

    return once


class _Last(torch.autograd.Function):
    """A gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, gradient: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name} has no second derivative")
