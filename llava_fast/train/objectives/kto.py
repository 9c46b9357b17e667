"""KTO (Ethayarajh et al. 2024, "Model Alignment as Prospect Theoretic Optimization"): single answers, labelled
desirable or undesirable, relative to the model that the run began with.

With r the log-ratio of policy and reference of an answer, the loss of a desirable answer is
lambda_D (1 - sigmoid(beta (r - z))), that of an undesirable one lambda_U (1 - sigmoid(beta (z - r))). The reference
point z = max(0, mean of r over answers to other questions) estimates KL(policy || reference); it has no gradient.

z is a mean over the whole step, independent of micro-batches and processes. It needs a pass over the step without
gradients before the one with gradients. Both run the same plans: image and question once, the answer and the mismatched
answer as branches.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from llava_fast.inputs.plan.plan import TokenPlan
from llava_fast.inputs.processor import Processor
from llava_fast.models.batch import Batch
from llava_fast.train.data.labelled import LabelledBatches, LabelledTable, mismatched, read_labelled
from llava_fast.train.data.loader import Loader
from llava_fast.train.data.run_samples import RunSamples
from llava_fast.train.data.samples import SampleTable, Source
from llava_fast.train.objectives.reference import AgainstReference, ReferenceSettings, answer_log_probs
from llava_fast.train.parallel import World

if TYPE_CHECKING:
    from llava_fast.generation.llava import Llava
    from llava_fast.train.recipe import Recipe

logger = logging.getLogger("llava_fast.train")

OWN, MISMATCHED = 0, 1
_ADVISED = (1.0, 4 / 3)  # the paper's range of lambda_D n_D / (lambda_U n_U)


class Kto(ReferenceSettings):
    """A recipe's section `kto`."""

    section: ClassVar[str] = "kto"

    beta: float = Field(0.1, gt=0)  # how closely the model keeps to the reference
    desirable_weight: float = Field(1.0, ge=0)  # lambda_D
    undesirable_weight: float = Field(1.0, ge=0)  # lambda_U

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if recipe.batch_size < 2:
            raise ValueError("`kto` compares an answer with those to other questions of its step: batch_size >= 2")
        if not self.desirable_weight and not self.undesirable_weight:
            raise ValueError("`kto.desirable_weight` and `kto.undesirable_weight` are both 0: nothing is learned")

    def objective(self, recipe: Recipe) -> KtoObjective:
        return KtoObjective(recipe, self)


class KtoObjective(AgainstReference):
    """Averages over answers."""

    unit = "answers"
    figures = ("desirable", "kl", "reward_desirable", "reward_undesirable")

    def __init__(self, recipe: Recipe, settings: Kto) -> None:
        super().__init__(recipe, settings)
        self.beta, self.weights = settings.beta, (settings.undesirable_weight, settings.desirable_weight)

    def read(self, sources: Sequence[Source]) -> SampleTable:
        return read_labelled(sources)

    def micro_batches(self, table: SampleTable, processor: Processor, references: np.ndarray | None) -> Dataset:
        return LabelledBatches(cast(LabelledTable, table), processor, self.others, references)

    def fingerprint(self) -> bytes:
        return self.others.tobytes()

    def prepare(self, loader: Loader, samples: RunSamples, processor: Processor, model: Llava, world: World) -> None:
        table, lengths = cast(LabelledTable, samples.table), samples.lengths
        self.others = mismatched(table, loader.schedule)
        loader.lengths = dataclasses.replace(lengths, text=lengths.text + lengths.supervised[self.others])
        if world.first:
            self._say_balance(table, np.flatnonzero(samples.left))
        super().prepare(loader, samples, processor, model, world)

    def _say_balance(self, table: LabelledTable, numbers: np.ndarray) -> None:
        desirable = sum(table.desirable(number) for number in numbers.tolist())
        undesirable = len(numbers) - desirable
        against = self.weights[False] * undesirable
        ratio = self.weights[True] * desirable / against if against else math.inf
        logger.log(
            logging.INFO if _ADVISED[0] <= ratio <= _ADVISED[1] else logging.WARNING,
            "%d desirable and %d undesirable answers: the ratio of their weights times their numbers is %.2f (the "
            "paper advises 1 to 1.33: see kto.desirable_weight)",
            *(desirable, undesirable, ratio),
        )

    def start(self, model: nn.Module, world: World) -> None:
        super().start(model, world)
        self.kl = torch.zeros((), device=world.device)
        self.references: deque[Tensor] = deque()

    def begin(self, step: int) -> None:
        super().begin(step)
        self.references.clear()

    def count(self, plan: TokenPlan) -> int:
        return len(plan.lengths)

    @torch.no_grad()
    def survey(self, model: nn.Module, batches: Iterable[Batch], count: int) -> None:
        total = torch.zeros(1, device=self.world.device)
        for batch in batches:
            reference, inputs = self.reference(model, batch)
            self.references.append(reference.clone())  # a copy, so that the batch can be freed
            losses, _ = self.forward(model, batch, inputs=inputs)
            if batch.plan.lengths:
                ratios = (answer_log_probs(losses, batch.plan)[0] - reference)[:, MISMATCHED]
                self.means.add(kl=ratios)
                total += ratios.sum()
        self.kl = (self.world.sum(total)[0] / count).clamp(min=0)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        reference = self.references.popleft()
        losses, _ = self.forward(model, batch)
        if not batch.plan.lengths:
            return losses
        ratios = (answer_log_probs(losses, batch.plan)[0] - reference)[:, OWN]
        desirable = batch.column("desirable").bool()
        rewards = self.beta * ratios.detach()
        labels = desirable.float()
        self.means.add(desirable=labels, reward_desirable=rewards[desirable], reward_undesirable=rewards[~desirable])
        return kto_losses(ratios, self.kl, desirable, self.beta, self.weights)

    @property
    def passes_beside(self) -> int:
        return 1 + super().passes_beside


def kto_losses(
    ratios: Tensor, kl: Tensor, desirable: Tensor, beta: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """The loss of each answer [answers].

    ratios     the policy's log-probability minus the reference's, float32 [answers].
    kl         the reference point z, a scalar.
    desirable  bool [answers]; weights: lambda_U, lambda_D.
    """
    sign = desirable.to(ratios.dtype) * 2 - 1
    weight = torch.where(desirable, weights[True], weights[False])
    return weight * torch.sigmoid(beta * sign * (kl - ratios))  # 1 - sigmoid(x) is sigmoid(-x)
