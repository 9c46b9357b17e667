"""linear_cross_entropy: the output head and its loss in one op, without materialising all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.ops import backend, library
from llava_fast.ops.linear_cross_entropy import chunked, reference

backend.register("linear_cross_entropy", "reference", "any device")
backend.register("linear_cross_entropy", "native", "any device, in chunks", default_on=("cpu", "cuda"))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of each row's target: [rows], float32 (float64 for float64 inputs).

    hidden [rows, width]; weight [vocabulary, width] and bias [vocabulary] as in nn.Linear; target int [rows], each in
    0 .. vocabulary - 1: pass only supervised rows. The mean of the result is the usual loss; the sum over an answer's
    rows is its negative log-probability. Gradients flow to hidden, weight and bias; those of weight and bias are summed
    in float32. Under autocast the products run in autocast's dtype. FLOPs: 2*rows*width*vocabulary forward, three times
    that backward (it recomputes the logits); minimum bytes: hidden and weight once. Raises ValueError for mismatched
    shapes. Source: Wijmans et al. 2024; Hsu et al. 2024.
    """
    if hidden.dim() != 2 or target.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must be [rows, width], weight {tuple(weight.shape)} [vocabulary, width], "
            f"target {tuple(target.shape)} [rows]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [{len(weight)} (vocabulary)]")
    hidden, weight, bias = library.autocast(hidden, weight, bias)
    return _linear_cross_entropy(hidden, weight, target, bias)[0]


def _form(device: str):
    return chunked if backend.choose("linear_cross_entropy", device) == "native" else reference


def _run(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _form(hidden.device.type).linear_cross_entropy(hidden, weight, target, bias)


def _run_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    denominator: Tensor,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    form = _form(hidden.device.type)
    found = form.linear_cross_entropy_backward(grad, hidden, weight, target, bias, denominator, needed)
    return tuple(hidden.new_empty(0) if each is None else each for each in found)


def _fake(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(len(hidden), dtype=wide), hidden.new_empty(len(hidden), dtype=wide)


def _fake_backward(grad, hidden, weight, target, bias, denominator, needed):
    inputs = (hidden, weight, bias)
    return tuple(
        like.new_empty(like.shape) if want and like is not None else hidden.new_empty(0)
        for like, want in zip(inputs, needed, strict=True)
    )


def _save(ctx, inputs, output) -> None:
    hidden, weight, target, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(hidden, weight, target, output[1], *([bias] if ctx.has_bias else []))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, _):
    if grad is None:
        return None, None, None, None
    hidden, weight, target, denominator, *bias = ctx.saved_tensors
    wants = ctx.needs_input_grad
    needed = [wants[0], wants[1], wants[3]]
    found = _linear_cross_entropy_backward(
        grad, hidden, weight, target, bias[0] if ctx.has_bias else None, denominator, needed
    )
    grads = [each if want else None for each, want in zip(found, needed, strict=True)]
    return grads[0], grads[1], None, grads[2]


_linear_cross_entropy_backward = library.define(
    "linear_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor target, Tensor? bias,"
    " Tensor denominator, bool[] needed) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_linear_cross_entropy = library.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor? bias) -> (Tensor, Tensor)",
    _run,
    _fake,
    _backward,
    _save,
)
