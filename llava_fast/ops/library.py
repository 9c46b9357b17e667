"""How an op becomes a `torch.library` operator, so that autograd, torch.compile and CUDA graphs take it as one node.

Registered by `Library.define` and `impl` rather than by the `custom_op` decorator, whose call costs several times as
much. The implementation chooses its backend when it runs, so a compiled graph still follows `use_backend`; if none is
requested, selection decides (`ops/selection`).
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

    The first argument is a tensor: if it is on a GPU, that GPU is the current one while `run` launches kernels. Tensors
    on different devices raise ValueError. `fake` gives the outputs' shapes and dtypes. `save(ctx, inputs, output)`
    keeps what `backward(ctx, *gradients)` needs; without them the op has no gradient. A second derivative raises
    RuntimeError.
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
    """The tensors (None stays None) cast as for a matrix product: to autocast's dtype if autocast is on.

    An op's operands are cast before the call; otherwise its two passes would multiply in different dtypes.
    """
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not torch.is_autocast_enabled(device):
        return list(tensors)  # type: ignore[arg-type]
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]  # type: ignore[misc]


def selected(name: str, run: Callable) -> Callable:
    """`run`, by selection's verdict if no backend is requested."""

    @functools.wraps(run)
    def by_verdict(*args):
        return policy.run(name, run, args) if backend.requested() == "auto" else run(*args)

    return by_verdict


def on_its_device(name: str, run: Callable) -> Callable:
    """`run` with the device of its first argument as the current one (Triton launches on the current device), and an
    error for a tensor on another: kernels take addresses as they are."""

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
    """`backward`, its results marked as final where autograd would differentiate them again (create_graph=True)."""

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
