"""swiglu: silu(gate) * up, the activation of a Llama MLP, as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.ops import backend, library, triton_support
from llava_fast.ops.swiglu import reference

backend.register("swiglu", "reference", "any device")
backend.register("swiglu", "triton", "CUDA")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    gate, up [..., width] floating, of one shape; rows may be strided (halves of one wider product). Returns
    [..., width], contiguous, in the dtype of gate * up. silu(gate) is rounded to gate's dtype first, as in the unfused
    steps.
    Saved for the backward pass: gate and up (only gate for up's gradient), but not silu(gate).
    For R rows of C values of b bytes: about 6RC FLOPs, at least 3RCb bytes (backward 12RC, 5RCb).
    Raises ValueError for different shapes or tensors that are not floating.
    """
    if not gate.dim() or gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have the same shape [.., width]")
    if not (gate.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"gate and up must be floating, got {gate.dtype} and {up.dtype}")
    return _swiglu(gate, up)


def _triton(*tensors: Tensor) -> bool:
    unfit = triton_support.unfit(*tensors) or triton_support.unequal(*tensors)
    return backend.choose("swiglu", tensors[0].device.type, {"triton": unfit}) == "triton"


def _run(gate: Tensor, up: Tensor) -> Tensor:
    if _triton(gate, up):
        from llava_fast.ops.swiglu import triton_kernels

        return triton_kernels.swiglu(gate, up)
    return reference.swiglu(gate, up).contiguous()


def _run_backward(grad: Tensor, gate: Tensor, up: Tensor, dtype: torch.dtype, needed: list[bool]) -> tuple[Tensor, ...]:
    if _triton(grad, gate, up):
        from llava_fast.ops.swiglu import triton_kernels

        found = triton_kernels.swiglu_backward(grad, gate, up, needed)
    else:
        found = reference.swiglu_backward(grad, gate, up, needed)
    dtypes = (gate.dtype, dtype)
    return tuple(
        grad.new_empty(0) if gradient is None else gradient.to(kept).contiguous()
        for gradient, kept in zip(found, dtypes, strict=True)
    )


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


def _fake_backward(grad, gate, up, dtype, needed) -> tuple[Tensor, ...]:
    return tuple(
        gate.new_empty(gate.shape, dtype=kept) if need else grad.new_empty(0)
        for need, kept in zip(needed, (gate.dtype, dtype), strict=True)
    )


def _save(ctx, inputs, output) -> None:
    gate, up = inputs
    ctx.save_for_backward(gate, up if ctx.needs_input_grad[0] else up.new_empty(0))


def _backward(ctx, grad: Tensor):
    needed = list(ctx.needs_input_grad[:2])
    gate, up = ctx.saved_tensors
    found = _swiglu_backward(grad, gate, up, up.dtype, needed)
    return tuple(gradient if need else None for gradient, need in zip(found, needed, strict=True))


_swiglu_backward = library.define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up, ScalarType dtype, bool[] needed) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_swiglu = library.define("swiglu(Tensor gate, Tensor up) -> Tensor", _run, _fake, _backward, _save)
