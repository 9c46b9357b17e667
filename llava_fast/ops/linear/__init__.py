"""linear: a linear layer in bfloat16 on a CPU: the output head of a decoding step, and prefill where PyTorch's products
of bfloat16 are slow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast.ops import backend
from llava_fast.ops.linear import native

backend.register("linear", "reference", "any device")
backend.register(
    "linear",
    "native",
    f"CPU; bfloat16, up to {native.MAX_ROWS} rows, more on x86 without AVX-512 BF16, no gradients",
    default_on=("cpu",),
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias.

    x [.., in], weight [out, in] (nn.Linear's), bias [out] or None, all floating and of one dtype. Returns [.., out] in
    that dtype. The reference is PyTorch's F.linear, with gradients. The native backend is for inference; it sums in
    float32, and up to MAX_ROWS rows, row i's result is bit-identical whatever the other rows.
    FLOPs for n rows: 2 * n * in * out. Minimum bytes: x, weight and output once.
    Raises ValueError for mismatched shapes.
    """
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} must be [.., in] and weight {tuple(weight.shape)} [out, in]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [{len(weight)}], one entry for each row of weight")
    unfit = native.unfit(x, weight, bias)
    if unfit is None and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        unfit = "it has no gradients"
    if backend.choose("linear", x.device.type, {"native": unfit}) == "native":
        return native.linear(x, weight, bias)
    return F.linear(x, weight, bias)
