"""rms_norm: RMSNorm alone, and fused with a residual add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_fast.ops import backend, library, triton_support
from llava_fast.ops.rms_norm import reference

backend.register("rms_norm", "reference", "any device")
backend.register("rms_norm", "triton", "CUDA")

MAX_WIDTH = 8192  # what fits into the registers of a Triton program


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the rows of x.

    x [..., width] floating; weight [width]. Returns [..., width] in the dtype of x * weight. x / rms(x) is computed in
    float32, rounded to x's dtype and then scaled, as in transformers' LlamaRMSNorm, with or without autocast.
    Saved for the backward pass: x and one float32 per row. (The unfused steps also save the normalised rows, and a
    float32 copy of 16-bit rows.) The weight's gradient is summed in float32 in a fixed order; nothing is computed for
    frozen tensors.
    For R rows of C values of b bytes: about 4RC FLOPs, at least 2RCb bytes (backward 9RC, 3RCb).
    Raises ValueError for mismatched shapes or an x that is not floating.
    """
    _check(x, weight)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(s, y): s = x + residual, y = RMSNorm(s).

    residual has x's shape; s has the dtype of x + residual, y that of s * weight. Otherwise as `rms_norm`: 5RC FLOPs,
    at least 4RCb bytes (backward 10RC, 4RCb).
    """
    _check(x, weight)
    if residual.shape != x.shape:
        raise ValueError(f"residual is {tuple(residual.shape)}, x {tuple(x.shape)}: they must have the same shape")
    return _add_rms_norm(x, residual, weight, eps)[:2]


def _check(x: Tensor, weight: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating, got {x.dtype}")
    width = x.shape[-1:]
    if not width or weight.shape != width:
        raise ValueError(f"weight {tuple(weight.shape)} must be [width] for x {tuple(x.shape)}")


def _implementation(x: Tensor, *others: Tensor | None) -> Any:
    """The module whose functions run: `reference` or `triton_kernels`."""
    unfit = triton_support.unfit(x, *others)
    if unfit is None and x.shape[-1] > MAX_WIDTH:
        unfit = f"rows of {x.shape[-1]} values do not fit into registers (at most {MAX_WIDTH} do)"
    if backend.choose("rms_norm", x.device.type, {"triton": unfit}) == "reference":
        return reference
    from llava_fast.ops.rms_norm import triton_kernels

    return triton_kernels


def _run(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    x, weight = x.contiguous(), weight.contiguous()
    return _implementation(x, weight).rms_norm(x, weight, eps)


def _run_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    x, residual, weight = (t.contiguous() for t in (x, residual, weight))
    return _implementation(x, residual, weight).add_rms_norm(x, residual, weight, eps)


def _run_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor, needed: list[bool]
) -> tuple[Tensor, ...]:
    grad, x, weight = (t.contiguous() for t in (grad, x, weight))
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    implementation = _implementation(grad, grad_sum, x, weight)
    found = implementation.rms_norm_backward(grad, grad_sum, x, rstd, weight, needed)
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in found)


def _outputs(total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Empty y and rstd."""
    y = total.new_empty(total.shape, dtype=torch.promote_types(total.dtype, weight.dtype))
    return y, total.new_empty((*total.shape[:-1], 1), dtype=torch.promote_types(total.dtype, torch.float32))


def _fake_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return total, *_outputs(total, weight)


def _fake_backward(grad, grad_sum, x, rstd, weight, needed) -> tuple[Tensor, ...]:
    return tuple(
        like.new_empty(like.shape) if need else grad.new_empty(0)
        for like, need in zip((x, weight), needed, strict=True)
    )


def _save(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], weight)


def _backward(ctx, grad: Tensor, *_):
    return *_gradients(grad, None, ctx.saved_tensors, list(ctx.needs_input_grad[:2])), None


def _save_add(ctx, inputs, output) -> None:
    x, residual, weight, _ = inputs
    total, _, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(total, rstd, weight)
    ctx.dtypes = x.dtype, residual.dtype


def _backward_add(ctx, grad_sum: Tensor | None, grad: Tensor | None, *_):
    of_x, of_residual, of_weight = ctx.needs_input_grad[:3]
    needed = [of_x or of_residual, of_weight]
    if grad is None:
        grad_rows, grad_weight = grad_sum, None
    else:
        grad_rows, grad_weight = _gradients(grad, grad_sum, ctx.saved_tensors, needed)
    of_rows = (
        grad_rows.to(dtype) if need and grad_rows is not None else None
        for need, dtype in zip((of_x, of_residual), ctx.dtypes, strict=True)
    )
    return *of_rows, grad_weight, None


def _gradients(grad: Tensor, grad_sum: Tensor | None, saved, needed: list[bool]) -> list[Tensor | None]:
    found = _rms_norm_backward(grad, grad_sum, *saved, needed)
    return [gradient if need else None for gradient, need in zip(found, needed, strict=True)]


_rms_norm_backward = library.define(
    "rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor rstd, Tensor weight, bool[] needed)"
    " -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_rms_norm = library.define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _run,
    lambda x, weight, eps: _outputs(x, weight),
    _backward,
    _save,
)
_add_rms_norm = library.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _run_add,
    _fake_add,
    _backward_add,
    _save_add,
)
