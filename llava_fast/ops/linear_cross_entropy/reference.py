"""The loss of an output head in plain PyTorch, all logits at once: the specification of `linear_cross_entropy`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(-log softmax(hidden @ weight.T + bias)[target], log of the softmax's denominator), each [rows], float32."""
    logits = wide_logits(hidden, weight, bias)
    denominator = logits.logsumexp(dim=1)
    return denominator - logits.gather(1, target.long()[:, None])[:, 0], denominator


def linear_cross_entropy_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    denominator: Tensor,
    needed: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias from `grad` [rows], that of the losses; None where not needed."""
    share = logit_gradient(grad, wide_logits(hidden, weight, bias), target, denominator)
    wide = share.dtype
    return (
        (share @ weight.to(wide)).to(hidden.dtype) if needed[0] else None,
        (share.T @ hidden.to(wide)).to(weight.dtype) if needed[1] else None,
        share.sum(0).to(bias.dtype) if needed[2] and bias is not None else None,
    )


def wide_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [rows, vocabulary] in float32 or wider, from a product in the operands' dtype as in a model's head."""
    logits = F.linear(hidden, weight, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def logit_gradient(grad: Tensor, logits: Tensor, target: Tensor, denominator: Tensor) -> Tensor:
    """grad * (softmax - one-hot), [rows, vocabulary]; overwrites `logits`."""
    share = logits.sub_(denominator[:, None]).exp_()
    share.scatter_add_(1, target.long()[:, None], torch.full_like(share[:, :1], -1.0))
    return share.mul_(grad.to(share.dtype)[:, None])
