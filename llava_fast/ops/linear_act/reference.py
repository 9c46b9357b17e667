"""A linear layer and its activation in plain PyTorch: the specification of `llava_fast.ops.linear_act`."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops import activations


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, form: ModuleType = activations
) -> tuple[Tensor, Tensor]:
    """(output, pre-activation). `form`: the module whose activation functions run, `activations` or `elementwise`."""
    pre = F.linear(x, weight, bias)
    return form.activate(activation, pre), pre


def linear_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str,
    needed: list[bool],
    form: ModuleType = activations,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias, None where not needed."""
    if activation:
        grad = form.activation_gradient(activation, grad, pre)
    flat = grad.flatten(0, -2)
    return (
        grad @ weight if needed[0] else None,
        flat.T @ x.flatten(0, -2) if needed[1] else None,
        flat.sum(0) if needed[2] else None,
    )
