"""quantised_linear: a linear layer whose weight is stored in 8 or 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.ops import backend, library, triton_support
from llava_fast.ops.quantised_linear import native, packing, reference
from llava_fast.ops.quantised_linear.reference import dequantise, dequantise_rows, quantise
from llava_fast.ops.quantised_linear.weight import GROUPS, SCHEMES, QuantisedWeight, check_scheme

__all__ = [
    "GROUPS",
    "SCHEMES",
    "QuantisedWeight",
    "check_scheme",
    "dequantise",
    "dequantise_rows",
    "packing",
    "quantise",
    "quantised_linear",
    "quantised_product",
]

backend.register("quantised_linear", "reference", "any device")
backend.register(
    "quantised_linear",
    "native",
    f"CPU; float32 or bfloat16, no gradients; above {native.MAX_ROWS} rows with AVX2",
    default_on=("cpu",),
)
backend.register("quantised_linear", "triton", "CUDA; float32, float16 or bfloat16")


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ dequantise(weight).T + bias.

    x [.., in] floating; bias [out] in x's dtype, or None. Returns [.., out] in x's dtype. Gradients flow to x and bias;
    the weight has none. The quantised weight is saved for the backward pass, x is not. Under autocast it runs in
    autocast's dtype, as nn.Linear does.
    The reference multiplies in x's dtype, but in float32 for bfloat16 and float16 on a CPU. The native backend, only
    for calls without gradients, rounds x to 8 bits (see native.py). The Triton backend multiplies a few rows by the
    codes, and more rows as the reference does, by the weight dequantised whole.
    FLOPs for n rows: 2 * n * in * out forward, and as many for x's gradient. Minimum bytes: codes, scales, x and output
    once.
    Raises ValueError for mismatched shapes.
    """
    return quantised_product(x, weight.codes, weight.scale, weight.zero, bias)


def quantised_product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    exact_inputs: bool = False,
) -> Tensor:
    """`quantised_linear` with the tensors of a QuantisedWeight, which are not validated again.

    exact_inputs: use no backend that rounds x, even if no gradient is needed.
    """
    out, stored = codes.shape
    columns = stored if codes.dtype == torch.int8 else 2 * stored
    if x.dim() < 2 or not x.is_floating_point() or x.shape[-1] != columns:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} must be floating [.., in] and the weight is {[out, columns]}")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias {tuple(bias.shape)} must be [{out}], one entry for each row of the weight")
    for name, part in {"codes": codes, "scale": scale, "zero": zero, "bias": bias}.items():
        if part is not None and part.device != x.device:
            raise ValueError(f"{name} is on {part.device} and x on {x.device}: move them to one device")
    x, bias = library.autocast(x, bias)
    if bias is not None and bias.dtype != x.dtype:
        raise ValueError(f"bias is {bias.dtype} and x {x.dtype}: they must be of one dtype")
    gradients = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    return _quantised_linear(x, codes, scale, zero, bias, gradients or exact_inputs)


def _run(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, exact: bool) -> Tensor:
    unfit = {
        "native": "it rounds its inputs and has no gradients" if exact else native.unfit(x),
        "triton": _unfit_for_triton(x, codes, scale, bias),
    }
    weight = QuantisedWeight.unchecked(codes, scale, zero)
    chosen = backend.choose("quantised_linear", x.device.type, unfit)
    if chosen == "triton":
        from llava_fast.ops.quantised_linear import triton_kernels

        return triton_kernels.quantised_linear(x, weight, bias)
    if chosen == "native":
        return native.quantised_linear(x, weight, bias)
    return reference.quantised_linear(x, weight, bias)


def _unfit_for_triton(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> str | None:
    if codes.shape[1] % 4:
        return f"it reads codes as 32-bit words, a row of the weight has {codes.shape[1]} bytes"
    return triton_support.unfit(x, scale, bias)


def _run_backward(
    grad: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    weight = QuantisedWeight.unchecked(codes, scale, zero)
    unfit = {"native": "it has no gradients", "triton": _unfit_for_triton(grad, codes, scale)}
    if backend.choose("quantised_linear", grad.device.type, unfit) == "triton":
        from llava_fast.ops.quantised_linear import triton_kernels

        found = triton_kernels.quantised_linear_backward(grad, weight, needed)
    else:
        found = reference.quantised_linear_backward(grad, weight, needed)
    of_x, of_bias = (grad.new_empty(0) if gradient is None else gradient for gradient in found)
    return of_x, of_bias


def _fake(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, exact: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _fake_backward(
    grad: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    columns = codes.shape[1] * (1 if codes.dtype == torch.int8 else 2)
    shapes = ((*grad.shape[:-1], columns), grad.shape[-1:])
    of_x, of_bias = (grad.new_empty(shape if want else 0) for shape, want in zip(shapes, needed, strict=True))
    return of_x, of_bias


def _save(ctx, inputs, output) -> None:
    _, codes, scale, zero, _, _ = inputs
    ctx.save_for_backward(codes, scale, *(() if zero is None else (zero,)))


def _backward(ctx, grad: Tensor):
    codes, scale, *zero = ctx.saved_tensors
    needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[4]]
    found = _quantised_linear_backward(grad, codes, scale, zero[0] if zero else None, needed)
    of_x, of_bias = (gradient if want else None for gradient, want in zip(found, needed, strict=True))
    return of_x, None, None, None, of_bias, None


_quantised_linear_backward = library.define(
    "quantised_linear_backward(Tensor grad, Tensor codes, Tensor scale, Tensor? zero, bool[] needed)"
    " -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_quantised_linear = library.define(
    "quantised_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, bool exact) -> Tensor",
    _run,
    _fake,
    _backward,
    _save,
)
