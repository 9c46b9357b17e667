"""Supervised fine-tuning: the negative log-likelihood of the supervised tokens."""

from __future__ import annotations

from torch import Tensor, nn

from llava_fast.inputs.plan.plan import TokenPlan
from llava_fast.models.batch import Batch
from llava_fast.train.objective import Objective, forward


class Sft(Objective):
    """Averages over supervised tokens of LLaVA-format samples. The default objective."""

    unit = "supervised_tokens"

    def count(self, plan: TokenPlan) -> int:
        return len(plan.column("supervised_row"))

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return forward(model, batch, self.recipe.precision)[0]
