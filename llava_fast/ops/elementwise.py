"""Activations and their gradients as one Triton kernel each, for the cuBLAS backend of an op.

The two functions have the signatures of those in `activations`, which the references use.
"""

from __future__ import annotations

from torch import Tensor

from llava_fast.ops import triton_support


def activate(name: str, x: Tensor) -> Tensor:
    """Apply the activation elementwise."""
    from llava_fast.ops import gemm

    return gemm.activation(x.contiguous(), name) if name else x


def activation_gradient(name: str, grad: Tensor, x: Tensor) -> Tensor:
    """`grad` times the activation's derivative at x."""
    from llava_fast.ops import gemm

    return gemm.activation(x.contiguous(), name, grad.contiguous()) if name else grad


def unfit(activation: str, *tensors: Tensor | None) -> str | None:
    """Why the cuBLAS backend does not support a call with these tensors; None if it does."""
    if not activation:
        return "there is no activation to fuse: the reference runs the same matrix products"
    return triton_support.unfit(*tensors)
