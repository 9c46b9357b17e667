"""layer_norm: LayerNorm alone, fused with a residual add, and two LayerNorms in sequence as in CLIP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_fast.ops import backend, library, triton_support
from llava_fast.ops.layer_norm import reference

backend.register("layer_norm", "reference", "any device")
backend.register("layer_norm", "triton", "CUDA")

MAX_WIDTH = 4096  # at 8192 float32 values the backward pass spills registers (sm_90)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of the rows of x.

    x [..., width] floating; weight, bias [width]. Returns [..., width] in x's dtype.
    Mean and variance (of the centred row) are float32. Gradients of weight and bias are summed in float32 in a fixed
    order; nothing is saved or computed for frozen parameters. Under autocast it runs in float32, as in PyTorch. For R
    rows of C values of b bytes: about 8RC FLOPs, at least 2RCb bytes (backward 11RC, 3RCb). Raises ValueError for
    mismatched shapes or an x that is not floating.
    """
    _check(x, weight, bias)
    return _layer_norm(x, weight, bias, eps)[0]


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(s, y): s = x + residual, y = LayerNorm(s).

    residual has x's shape; both results have the dtype of x + residual. Otherwise as `layer_norm`: 9RC FLOPs, at least
    4RCb bytes (backward 12RC, 4RCb).
    """
    _check(x, weight, bias)
    if residual.shape != x.shape:
        raise ValueError(f"residual is {tuple(residual.shape)}, x {tuple(x.shape)}: they must have the same shape")
    return _add_layer_norm(x, residual, weight, bias, eps)[:2]


def double_layer_norm(
    x: Tensor, pre_weight: Tensor, pre_bias: Tensor, pre_eps: float, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, y): s = LayerNorm(x) with the `pre_` parameters, y = LayerNorm(s) with the others: CLIP's pre-LayerNorm and
    its first layer's.

    Otherwise as `layer_norm`: 16RC FLOPs, at least 3RCb bytes (backward 23RC, 7RCb, in two steps).
    """
    _check(x, pre_weight, pre_bias)
    _check(x, weight, bias)
    return _double_layer_norm(x, pre_weight, pre_bias, pre_eps, weight, bias, eps)[:2]


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating, got {x.dtype}")
    width = tuple(x.shape[-1:])
    if not width or weight.shape != width or bias.shape != width:
        raise ValueError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must both be [width] for x {tuple(x.shape)}"
        )


def _implementation(x: Tensor, *others: Tensor | None) -> Any:
    """The module whose functions run: `reference` or `triton_kernels`."""
    unfit = triton_support.unfit(x, *others)
    if unfit is None and x.shape[-1] > MAX_WIDTH:
        unfit = f"rows of {x.shape[-1]} values do not fit into registers (at most {MAX_WIDTH} do)"
    if backend.choose("layer_norm", x.device.type, {"triton": unfit}) == "reference":
        return reference
    from llava_fast.ops.layer_norm import triton_kernels

    return triton_kernels


def _run(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    x, weight, bias = _contiguous(x, weight, bias)
    return _implementation(x, weight, bias).layer_norm(x, weight, bias, eps)


def _run_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    x, residual, weight, bias = _contiguous(x, residual, weight, bias)
    return _implementation(x, residual, weight, bias).add_layer_norm(x, residual, weight, bias, eps)


def _run_double(
    x: Tensor, pre_weight: Tensor, pre_bias: Tensor, pre_eps: float, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, ...]:
    x, pre_weight, pre_bias, weight, bias = _contiguous(x, pre_weight, pre_bias, weight, bias)
    implementation = _implementation(x, pre_weight, pre_bias, weight, bias)
    return implementation.double_layer_norm(x, pre_weight, pre_bias, pre_eps, weight, bias, eps)


def _run_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    grad, grad_sum, x, weight = _contiguous(grad, grad_sum, x, weight)
    implementation = _implementation(grad, grad_sum, x, weight)
    found = implementation.layer_norm_backward(grad, grad_sum, x, mean, rstd, weight, tuple(needed))
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in found)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty mean and rstd."""
    shape, dtype = (*x.shape[:-1], 1), torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_statistics(x)


def _fake_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return total, torch.empty_like(total), *_statistics(total)


def _fake_double(x: Tensor, *parameters) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty(x.shape), *_statistics(x), *_statistics(x)


def _fake_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    return tuple(
        like.new_empty(like.shape if need else 0) for like, need in zip((grad, weight, weight), needed, strict=True)
    )


def _kept(rows: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> list:
    """The tensors that the backward of one LayerNorm reads (for the bias's gradient only the weight's dtype)."""
    return [rows, mean, rstd, weight] if any(needed[:2]) else [None, None, None, weight]


def _save(ctx, inputs, output) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*_kept(x, mean, rstd, weight, ctx.needs_input_grad[:3]))


def _backward(ctx, grad: Tensor, *_):
    needed = list(ctx.needs_input_grad[:3])
    grads = _gradients(grad, None, ctx.saved_tensors, needed)
    return (*grads, None)


def _save_add(ctx, inputs, output) -> None:
    x, residual, weight, _, _ = inputs
    total, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    of_x, of_residual, *of_parameters = ctx.needs_input_grad[:4]
    ctx.save_for_backward(*_kept(total, mean, rstd, weight, (of_x or of_residual, *of_parameters)))
    ctx.dtypes = x.dtype, residual.dtype


def _backward_add(ctx, grad_sum: Tensor | None, grad: Tensor | None, *_):
    of_x, of_residual, *of_parameters = ctx.needs_input_grad[:4]
    grad_rows, *grads = _gradients(grad, grad_sum, ctx.saved_tensors, [of_x or of_residual, *of_parameters])
    of_rows = (
        grad_rows.to(dtype) if need and grad_rows is not None else None
        for need, dtype in zip((of_x, of_residual), ctx.dtypes, strict=True)
    )
    return (*of_rows, *grads, None)


def _save_double(ctx, inputs, output) -> None:
    x, pre_weight, _, _, weight, _, _ = inputs
    s, _, pre_mean, pre_rstd, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(pre_mean, pre_rstd, mean, rstd)
    of_x, of_pre_weight, of_pre_bias, _, of_weight, _of_bias, _ = ctx.needs_input_grad[:7]
    of_s = of_x or of_pre_weight or of_pre_bias
    ctx.save_for_backward(
        *_kept(x, pre_mean, pre_rstd, pre_weight, (of_x, of_pre_weight)),
        *_kept(s, mean, rstd, weight, (of_s, of_weight)),
    )


def _backward_double(ctx, grad_s: Tensor | None, grad: Tensor | None, *_):
    of_x, of_pre_weight, of_pre_bias, _, of_weight, of_bias, _ = ctx.needs_input_grad[:7]
    first, second = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    of_s = of_x or of_pre_weight or of_pre_bias
    grad_s, *grads = _gradients(grad, grad_s, second, [of_s, of_weight, of_bias])
    before = _gradients(grad_s, None, first, [of_x, of_pre_weight, of_pre_bias])
    return (*before, None, *grads, None)


def _gradients(grad: Tensor | None, grad_sum: Tensor | None, saved, needed: list[bool]) -> list[Tensor | None]:
    """Gradients of rows, weight and bias of one LayerNorm with output gradient `grad`; `grad_sum` is added to that of
    the rows. None where not needed or if there is no incoming gradient."""
    if grad is None or not any(needed):
        return [grad_sum if needed[0] else None, None, None]
    found = _layer_norm_backward(grad, grad_sum, *saved, needed)
    return [gradient if need else None for gradient, need in zip(found, needed, strict=True)]


_layer_norm_backward = library.define(
    "layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor? x, Tensor? mean, Tensor? rstd, Tensor weight,"
    " bool[] needed) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_layer_norm = library.define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _backward,
    _save,
)
_add_layer_norm = library.define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_add,
    _fake_add,
    _backward_add,
    _save_add,
)
_double_layer_norm = library.define(
    "double_layer_norm(Tensor x, Tensor pre_weight, Tensor pre_bias, float pre_eps, Tensor weight, Tensor bias,"
    " float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_double,
    _fake_double,
    _backward_double,
    _save_double,
)
for _op in (_layer_norm, _add_layer_norm, _double_layer_norm):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(_op, _device, torch.float32, lib=library.LIBRARY)
