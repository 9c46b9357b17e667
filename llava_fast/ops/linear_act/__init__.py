"""linear_act: a linear layer with its bias and activation as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.ops import activations, backend, elementwise, library, triton_support
from llava_fast.ops.linear_act import reference

backend.register("linear_act", "reference", "any device")
backend.register("linear_act", "cublas", "CUDA, with an activation")
backend.register("linear_act", "triton", "CUDA")


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "") -> Tensor:
    """activation(x @ weight.T + bias).

    x [.., in], weight [out, in] (nn.Linear's), bias [out] or None; activation by transformers' name ("quick_gelu",
    "gelu", "gelu_pytorch_tanh", "relu", "silu"), "" for none.
    Returns [.., out] in their dtype. Gradients flow to x, weight and bias; sums are float32. The pre-activation is
    saved only if one of these gradients is needed, the output never. Under autocast it runs in autocast's dtype, as
    nn.Linear does. FLOPs for n rows: 2 * n * in * out forward, and again for each of the gradients of x and weight.
    Minimum bytes: x, weight and output once; in training the pre-activation is also written once and read once. Raises
    ValueError for mismatched shapes and for an unknown activation.
    """
    activations.check(activation)
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} must be [.., in] and weight {tuple(weight.shape)} [out, in]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [{len(weight)}], one entry for each row of weight")
    x, weight, bias = library.autocast(x, weight, bias)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _linear_act(x, weight, bias, activation, bool(activation) and trains)[0]


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    given = [x, weight] if bias is None else [x, weight, bias]
    unfit = {
        "triton": triton_support.unfit(*given) or triton_support.unequal(*given),
        "cublas": elementwise.unfit(activation, *given),
    }
    chosen = backend.choose("linear_act", x.device.type, unfit)
    if chosen == "triton":
        from llava_fast.ops.linear_act import triton_kernels

        return triton_kernels.linear_act(
            x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), activation, keep
        )
    form = elementwise if chosen == "cublas" else activations
    out, pre = reference.linear_act(x, weight, bias, activation, form)
    return out, pre if keep else pre.new_empty(0)


def _run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str, needed: list[bool]
) -> tuple[Tensor, ...]:
    unfit = {"triton": triton_support.unfit(grad), "cublas": elementwise.unfit(activation, grad)}
    chosen = backend.choose("linear_act", grad.device.type, unfit)
    if chosen == "triton":
        from llava_fast.ops.linear_act import triton_kernels

        grad, x, weight, pre = (t.contiguous() for t in (grad, x, weight, pre))
        found = triton_kernels.linear_act_backward(grad, x, weight, pre, activation, needed)
    else:
        form = elementwise if chosen == "cublas" else activations
        found = reference.linear_act_backward(grad, x, weight, pre, activation, needed, form)
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in found)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


def _fake_backward(grad, x, weight, pre, activation, needed) -> tuple[Tensor, ...]:
    shapes = ((*grad.shape[:-1], weight.shape[-1]), (grad.shape[-1], x.shape[-1]), grad.shape[-1:])
    return tuple(grad.new_empty(shape if want else 0) for shape, want in zip(shapes, needed, strict=True))


def _save(ctx, inputs, output) -> None:
    x, weight, _, activation, _ = inputs
    needed = ctx.needs_input_grad
    ctx.save_for_backward(x if needed[1] else x.new_empty(0), weight if needed[0] else x.new_empty(0), output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.activation = activation


def _backward(ctx, grad: Tensor | None, _):
    if grad is None:
        return None, None, None, None, None
    needed = list(ctx.needs_input_grad[:3])
    found = _linear_act_backward(grad, *ctx.saved_tensors, ctx.activation, needed)
    return *(gradient if want else None for gradient, want in zip(found, needed, strict=True)), None, None


_linear_act_backward = library.define(
    "linear_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor pre, str activation, bool[] needed)"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_linear_act = library.define(
    "linear_act(Tensor x, Tensor weight, Tensor? bias, str activation, bool keep) -> (Tensor, Tensor)",
    _run,
    _fake,
    _backward,
    _save,
)
