"""The loss of an output head, one chunk of the vocabulary at a time, so that the full logits are never materialised.

The backward pass recomputes the logits, as in activation checkpointing: one more matrix product instead of rows x
vocabulary of memory. Method: Wijmans et al. 2024 (Cut Cross-Entropy) and Hsu et al. 2024 (Liger Kernel), with PyTorch's
matrix products. Chunking the vocabulary instead of the rows reads each weight once per pass and computes its gradient
as one product over all rows, written in place. The much smaller gradient of the hidden rows is accumulated over the
chunks in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llava_fast.ops.linear_cross_entropy.reference import wide_logits

CHUNK_BYTES = 64 << 20
"""Largest float32 logits of one chunk, except on the CPU."""
CPU_CHUNK_BYTES = 4 << 20  # stays in the caches
LEAST_COLUMNS = 1024
"""Least tokens of the vocabulary in a chunk, for any number of rows: narrower products are slow."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    denominator = torch.full((len(hidden),), float("-inf"), dtype=wide, device=hidden.device)
    logit = torch.zeros_like(denominator)  # the logit of each row's target
    for part in _parts(hidden, len(weight), wide):
        logits = wide_logits(hidden, weight[part], None if bias is None else bias[part])
        inside, column = _place(target, part)
        logit += logits.gather(1, column).where(inside, 0)[:, 0]
        largest = logits.amax(1, keepdim=True)
        sums = logits.sub_(largest).exp_().sum(1)  # logsumexp in place, without a second buffer
        denominator = torch.logaddexp(denominator, sums.log_() + largest[:, 0])
        del logits  # before the next part's are made
    return denominator - logit, denominator


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
    grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if needed[0] else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needed[1] else None
    grad_bias = torch.empty_like(bias) if needed[2] and bias is not None else None
    for part in _parts(hidden, len(weight), wide):
        logits = wide_logits(hidden, weight[part], None if bias is None else bias[part])
        share = logits.sub_(denominator[:, None]).exp_()
        inside, column = _place(target, part)
        share.scatter_add_(1, column, inside.to(wide).neg_()).mul_(grad.to(wide)[:, None])
        if grad_bias is not None:
            grad_bias[part] = share.sum(0)
        narrow = share.to(weight.dtype)  # tensor-core operands; the products accumulate in float32
        if grad_hidden is not None and narrow.dtype == wide:
            grad_hidden.addmm_(narrow, weight[part])
        elif grad_hidden is not None:
            grad_hidden += narrow @ weight[part]
        if grad_weight is not None:
            torch.mm(narrow.T, hidden, out=grad_weight[part])
        del logits, share, narrow  # before the next part's are made
    return grad_hidden.to(hidden.dtype) if grad_hidden is not None else None, grad_weight, grad_bias


def _parts(hidden: Tensor, vocabulary: int, wide: torch.dtype) -> Iterator[slice]:
    """Equal chunks of the vocabulary, as large as the limits allow."""
    size = CPU_CHUNK_BYTES if hidden.is_cpu else CHUNK_BYTES
    most = max(size // max(len(hidden) * wide.itemsize, 1), LEAST_COLUMNS)
    size = -(-vocabulary // -(-vocabulary // most))
    return (slice(first, min(first + size, vocabulary)) for first in range(0, vocabulary, size))


def _place(target: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Whether each row's target is in this chunk, and its column there (arbitrary if it is not): both [rows, 1]."""
    column = target.long()[:, None] - part.start
    inside = (column >= 0) & (column < part.stop - part.start)
    return inside, column.clamp_(0, part.stop - part.start - 1)
