"""Direct preference optimisation (Rafailov et al. 2023): raises the likelihood of the chosen answer over the rejected
one, relative to the model that the run began with.

A pair is one sequence in which both answers follow their common prefix (see data.pairs), so image and question run only
once, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from llava_fast.inputs.plan.plan import TokenPlan
from llava_fast.inputs.processor import Processor
from llava_fast.models.batch import Batch
from llava_fast.train.data.lengths import Lengths
from llava_fast.train.data.pairs import Answers, PairBatches, read_pairs
from llava_fast.train.data.samples import SampleTable, Source
from llava_fast.train.objectives.reference import AgainstReference, ReferenceSettings, answer_log_probs

if TYPE_CHECKING:
    from llava_fast.train.recipe import Recipe


class Dpo(ReferenceSettings):
    """A recipe's section `dpo`."""

    section: ClassVar[str] = "dpo"

    beta: float = Field(0.1, gt=0)  # how closely the model keeps to the reference
    sft_weight: float = Field(0.0, ge=0)  # weight of the chosen answers' mean negative log-likelihood in the loss
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)  # assumed share of pairs with swapped answers

    def objective(self, recipe: Recipe) -> DpoObjective:
        return DpoObjective(recipe, self)


class DpoObjective(AgainstReference):
    """Averages over pairs."""

    unit = "pairs"
    # A pair's loss falls from 0.69 towards 0, so a single unusual pair may be many times the usual loss.
    stops_at_spikes = False
    figures = ("dpo_loss", "sft_loss", "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")

    def __init__(self, recipe: Recipe, settings: Dpo) -> None:
        super().__init__(recipe, settings)
        self.beta, self.sft_weight, self.smoothing = settings.beta, settings.sft_weight, settings.label_smoothing

    def read(self, sources: Sequence[Source]) -> SampleTable:
        return read_pairs(sources)

    def lengths(self, table: SampleTable, measured: Lengths) -> tuple[Lengths, Lengths | None]:
        return cast(Answers, table).rows(measured)

    def micro_batches(self, table: SampleTable, processor: Processor, references: np.ndarray | None) -> Dataset:
        return PairBatches(cast(Answers, table), processor, references)

    def count(self, plan: TokenPlan) -> int:
        return len(plan.lengths)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        reference, inputs = self.reference(model, batch)
        losses, _ = self.forward(model, batch, inputs=inputs)
        if not batch.plan.lengths:
            return losses
        policy, tokens = answer_log_probs(losses, batch.plan)
        rewards = self.beta * (policy - reference)
        each = preference_losses(rewards, self.smoothing)
        sft = -policy[:, 0] / tokens[:, 0]
        with torch.no_grad():
            margin = rewards[:, 0] - rewards[:, 1]
            figures = (each, sft, rewards[:, 0], rewards[:, 1], margin, (margin > 0).float())
            self.means.add(**dict(zip(self.figures, figures, strict=True)))
        return each + self.sft_weight * sft


def preference_losses(rewards: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """DPO's sigmoid loss of each pair, float32 [pairs]. rewards [pairs, 2]: beta * (log-probability - the reference's)
    of the chosen and of the rejected answer. label_smoothing: assumed share of wrong preferences (Mitchell 2023)."""
    margin = rewards[:, 0] - rewards[:, 1]
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
