"""Activations and their gradients as one kernel each, for the form of an op that leaves its products to cuBLAS.

Two functions with the arguments of those in `activations`, which the references take in their place.
"""

from __future__ import annotations

from torch import Tensor

from llava_fast.ops import triton_support


def activate(name: str, x: Tensor) -> Tensor:
    """The activation of x."""
    from llava_fast.ops import gemm

    return gemm.activation(x.contiguous(), name) if name else x


def activation_gradient(name: str, grad: Tensor, x: Tensor) -> Tensor:
    """`grad` times the activation's derivative at x."""
    from llava_fast.ops import gemm

    return gemm.activation(x.contiguous(), name, grad.contiguous()) if name else grad


def unfit(activation: str, *tensors: Tensor | None) -> str | None:
    """Why no such form can serve a call with these tensors; None if it can."""
    if not activation:
        return "there is no activation to fuse, and the reference is products alone already"
    return triton_support.unfit(*tensors)
