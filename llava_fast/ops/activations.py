"""Activation functions and their gradients, named as in transformers; "" means no activation.

`quick_gelu` is CLIP's approximation, `gelu` the exact (erf) GELU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


def check(name: str) -> None:
    """Raise ValueError unless `name` is "" or a key of ACTIVATIONS."""
    if name and name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: choose one of {', '.join(ACTIVATIONS)}, or '' for none")


def activate(name: str, x: Tensor) -> Tensor:
    """Apply the activation elementwise."""
    return ACTIVATIONS[name](x) if name else x


def activation_gradient(name: str, grad: Tensor, x: Tensor) -> Tensor:
    """`grad` times the activation's derivative at x, elementwise, with autograd's formulas."""
    aten = torch.ops.aten
    if name == "gelu":
        return aten.gelu_backward(grad, x)
    if name == "gelu_pytorch_tanh":
        return aten.gelu_backward(grad, x, approximate="tanh")
    if name == "silu":
        return aten.silu_backward(grad, x)
    if name == "relu":
        return aten.threshold_backward(grad, x, 0)
    if name == "quick_gelu":
        gate = torch.sigmoid(1.702 * x)
        return grad * gate * (1 + 1.702 * x * (1 - gate))
    return grad
