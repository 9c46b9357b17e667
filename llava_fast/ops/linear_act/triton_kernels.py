"""linear_act with the shared GEMM: bias and activation in its epilogue, gradients without atomics."""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.ops import gemm, sums
from llava_fast.ops.triton_support import Specimen


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """(output [.., out], the pre-activation [.., out] if `keep`, else empty)."""
    shape = (*x.shape[:-1], len(weight))
    rows = x.shape[:-1].numel()
    pre = torch.empty(shape if keep else (0,), dtype=x.dtype, device=x.device)
    out = gemm.gemm(x, weight, rows, bias=bias, activation=activation, pre=pre if keep else None)
    return out.view(shape), pre


def linear_act_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str, needed: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias, None where not needed."""
    rows = grad.shape[:-1].numel()
    if activation:  # applied once here: in the GEMM's operand loads it would run once per output tile
        grad = gemm.activation(pre, activation, grad)
    return (
        gemm.gemm(grad, weight, rows, transposed=False).view(*grad.shape[:-1], weight.shape[1]) if needed[0] else None,
        gemm.weight_gradient(grad, x, rows) if needed[1] else None,
        sums.sum_rows(grad, rows) if needed[2] else None,
    )


def specimens() -> list[Specimen]:
    """The first MLP layers of CLIP (quick GELU; erf GELU in OpenCLIP's) and SigLIP (tanh GELU), in inference and
    training; in float32 only quick GELU."""
    op = "linear_act"
    found = []
    for dtype in ("bf16", "fp16"):
        for name in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
            for keep in (False, True):
                label = f"{dtype} {name}{', kept' if keep else ''}"
                found.append(gemm.gemm_specimen(op, dtype, label, activation=name, bias=True, pre=keep))
            found += [gemm.activation_specimen(op, dtype, name, gradient) for gradient in (False, True)]
        found.append(gemm.weight_gradient_specimen(op, dtype, f"{dtype}, rows shared out", out="fp32"))
    found.append(gemm.gemm_specimen(op, "fp32", "fp32 quick_gelu", activation="quick_gelu", bias=True))
    found += [gemm.activation_specimen(op, "fp32", "quick_gelu", gradient) for gradient in (False, True)]
    for dtype in ("bf16", "fp16", "fp32"):
        found.append(gemm.gemm_specimen(op, dtype, f"{dtype} gradient of x", transposed=False))
        found.append(gemm.weight_gradient_specimen(op, dtype, dtype))
        found += sums.sum_specimens(op, dtype)
    return found
