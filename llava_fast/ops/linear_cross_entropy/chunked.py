"""The loss of an output head a chunk of rows at a time: never more than CHUNK_BYTES of logits exist.

The backward pass makes the logits again, as activation checkpointing would: one more matrix product instead of
rows x vocabulary of memory. Method: Wijmans et al. 2024 (Cut Cross-Entropy) and Hsu et al. 2024 (Liger Kernel), in
PyTorch's own matrix products. Weight and bias gradients are summed over the chunks in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.ops.linear_cross_entropy.reference import logit_gradient, wide_logits

CHUNK_BYTES = 64 << 20


def rows_a_chunk(vocabulary: int, itemsize: int = 4) -> int:
    return max(1, CHUNK_BYTES // (vocabulary * itemsize))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss, denominator = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(2))
    for rows in _chunks(len(hidden), len(weight), wide):
        logits = wide_logits(hidden[rows], weight, bias)
        denominator[rows] = logits.logsumexp(dim=1)
        loss[rows] = denominator[rows] - logits.gather(1, target[rows].long()[:, None])[:, 0]
    return loss, denominator


def linear_cross_entropy_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    denominator: Tensor,
    needed: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    wide = denominator.dtype
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed[0] else None
    grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needed[1] else None
    grad_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if needed[2] else None
    for rows in _chunks(len(hidden), len(weight), wide):
        share = logit_gradient(grad[rows], wide_logits(hidden[rows], weight, bias), target[rows], denominator[rows])
        if grad_bias is not None:
            grad_bias += share.sum(0)
        narrow = share.to(weight.dtype)  # the matrix units' operands; sums stay in float32 inside a product
        if grad_hidden is not None:
            grad_hidden[rows] = narrow @ weight
        if grad_weight is not None:
            grad_weight += narrow.T @ hidden[rows]
    return (
        grad_hidden,
        grad_weight.to(weight.dtype) if grad_weight is not None else None,
        grad_bias.to(bias.dtype) if grad_bias is not None and bias is not None else None,
    )


def _chunks(rows: int, vocabulary: int, wide: torch.dtype) -> list[slice]:
    size = rows_a_chunk(vocabulary, wide.itemsize)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
