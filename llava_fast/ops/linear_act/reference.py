"""A linear layer and its activation in plain PyTorch: the specification of `llava_fast.ops.linear_act`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops.activations import activate, activation_gradient


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """(output, what was activated)."""
    pre = F.linear(x, weight, bias)
    return activate(activation, pre), pre


def linear_act_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str, needed: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias, None where not needed."""
    if activation:
        grad = activation_gradient(activation, grad, pre)
    flat = grad.flatten(0, -2)
    return (
        grad @ weight if needed[0] else None,
        flat.T @ x.flatten(0, -2) if needed[1] else None,
        flat.sum(0) if needed[2] else None,
    )
