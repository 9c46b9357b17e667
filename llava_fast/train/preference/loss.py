"""The loss of preference tuning: from losses of rows to each answer's log-probability to the loss of each pair."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast.inputs.plan.plan import TokenPlan


def answer_log_probs(losses: Tensor, plan: TokenPlan) -> tuple[Tensor, Tensor]:
    """(log-probability, number of tokens) of each pair's two answers, float32 [pairs, 2] both, from the negative
    log-likelihoods of a plan's supervised rows. Tokens that both answers begin with count for both."""
    part = 3 * plan.column("supervised_sequence") + plan.column("supervised_tail")
    counts = torch.from_numpy(np.bincount(part, minlength=3 * len(plan.lengths))).to(losses.device)
    sums = torch.segment_reduce(losses, "sum", lengths=counts, initial=0).view(-1, 3)  # rows are in order of `part`
    tokens = counts.view(-1, 3).to(losses.dtype)
    return -(sums[:, :1] + sums[:, 1:]), tokens[:, :1] + tokens[:, 1:]


def preference_losses(rewards: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """DPO's sigmoid loss of each pair [pairs], from beta * (log-probability - the reference's) of its chosen and its
    rejected answer [pairs, 2]. With smoothing, so large a share of preferences is taken to be wrong (Mitchell 2023)."""
    margin = rewards[:, 0] - rewards[:, 1]
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
