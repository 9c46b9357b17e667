"""Stage 1 of BLIP-2: a Q-Former learns, beside a frozen tower, what of an image a text says (Li et al. 2023, section
3.2). Three losses: contrast of images and texts of the batch (ITC), whether an image and a text match, with hard
negatives of the batch (ITM), and the caption from the image (ITG). See models.retrieval.

The samples that the processes run at once, `micro_batch` on each, are compared with each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llava_fast.checkpoints.assemble import Assembly
from llava_fast.errors import RecipeError
from llava_fast.inputs.plan.plan import TokenPlan
from llava_fast.inputs.processor import Processor
from llava_fast.models.batch import Batch
from llava_fast.models.retrieval import StageOneOutput
from llava_fast.retrieval import load_retrieval, load_retrieval_processor
from llava_fast.train.data.captions import CaptionProcessor
from llava_fast.train.objective import Objective, ObjectiveSettings
from llava_fast.train.parallel import World

if TYPE_CHECKING:
    from llava_fast.generation.llava import Llava
    from llava_fast.train.recipe import Recipe


class StageOne(ObjectiveSettings):
    """A recipe's section `stage_one`."""

    most_tokens: int = Field(32, ge=3)  # of a caption, [CLS] and [SEP] included; longer ones are cut

    def check(self, recipe: Recipe) -> None:
        data = recipe.data
        if (data.batching, recipe.loss_average, data.label_mask) != ("padded", "step", "answers"):
            raise ValueError(
                "`stage_one` needs data.batching: padded, loss_average: step and data.label_mask: answers, since the "
                "samples of a micro-batch are compared with each other"
            )
        if data.max_length is not None or data.too_long == "cut":
            raise ValueError(
                "`stage_one` cuts captions to stage_one.most_tokens: leave data.max_length and data.too_long out"
            )
        if recipe.micro_batch_rows is not None:
            raise ValueError("`stage_one` runs micro_batch pairs at once: leave micro_batch_rows out")
        if recipe.batch_size % recipe.micro_batch:
            raise ValueError("`stage_one` needs a batch_size that is a multiple of micro_batch")
        if recipe.micro_batch < 2:
            raise ValueError("`stage_one` compares the samples of a micro-batch: set micro_batch to 2 or more")
        if recipe.lora is not None or recipe.quantize is not None or recipe.parallel.tensor > 1:
            raise ValueError("`stage_one` trains a Q-Former: leave `lora`, `quantize` and `parallel.tensor` out")
        if data.template is not None or recipe.layout != "hf" or not isinstance(recipe.model, str):
            raise ValueError(
                "`stage_one` trains a checkpoint in the layout of Blip2ForImageTextRetrieval (`model:` names one), "
                "without a chat template, and writes one with `layout: hf`"
            )

    def objective(self, recipe: Recipe) -> StageOneObjective:
        return StageOneObjective(recipe, self)


class StageOneObjective(Objective):
    """Averages over pairs of an image and its caption."""

    unit = "pairs"
    usual_text = 16
    figures: ClassVar[tuple[str, ...]] = ("contrastive_loss", "matching_loss", "caption_loss")

    def __init__(self, recipe: Recipe, settings: StageOne) -> None:
        super().__init__(recipe)
        self.most_tokens = settings.most_tokens

    def load(self) -> Llava:
        model = load_retrieval(str(self.recipe.model), "cpu")
        try:
            _ = model.first_word
        except ValueError as problem:
            raise RecipeError(f"model: {problem}") from None
        return cast("Llava", model)  # a LlavaModel, of which the trainer needs no more

    def read_processor(self, model: str | Assembly, template: str | None) -> Processor:
        return CaptionProcessor.of(load_retrieval_processor(str(model)), self.most_tokens)

    def processor(self, model: Llava) -> Processor:
        return CaptionProcessor.of(super().processor(model), self.most_tokens)

    def start(self, model: nn.Module, world: World) -> None:
        super().start(model, world)
        each = self.recipe.micro_batch * world.size
        if self.recipe.batch_size % each:
            raise RecipeError(
                f"batch_size: {self.recipe.batch_size} samples are no multiple of micro_batch x {world.size} processes "
                f"({each}), so some would be compared with fewer than others"
            )
        self.begin(0)

    def begin(self, step: int) -> None:
        super().begin(step)
        self.step, self.micro = step, 0

    def count(self, plan: TokenPlan) -> int:
        return len(plan.lengths)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        seed = np.random.SeedSequence([self.recipe.seed, self.step, self.micro]).generate_state(1)
        self.micro += 1
        dtype = getattr(torch, self.recipe.precision)
        cast_here = dtype != torch.float32 and not isinstance(model, FSDPModule)
        with torch.autocast(batch.flat.device.type, dtype, enabled=cast_here):
            out: StageOneOutput = model(batch, logits="none", seed=int(seed[0]), gather=self.world.gather_rows)
        assert out.losses is not None
        assert out.contrast is not None
        assert out.match is not None
        assert out.caption is not None
        self.means.add(contrastive_loss=out.contrast, matching_loss=out.match, caption_loss=out.caption)
        return out.losses
