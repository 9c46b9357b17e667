"""The LLaVA model: tiles run through tower and projector and are placed among the text, then the decoder runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast.errors import RequestError
from llava_fast.inputs.plan.plan import Layout
from llava_fast.inputs.plan.routed import without_rows
from llava_fast.inputs.processor import Processor
from llava_fast.models import encode, router
from llava_fast.models.batch import Batch
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.config import ConfiguredModel, LlavaConfig
from llava_fast.models.paged_cache import PagedCache
from llava_fast.models.visual import VisualModel

Logits = Literal["last", "supervised", "all", "none"]


class Inputs(NamedTuple):
    """The decoder's inputs `embeds` [rows, width], and the batch whose rows they are: without those that the model's
    router left out."""

    batch: Batch
    embeds: Tensor


@dataclass(frozen=True)
class LlavaOutput:
    """`logits` [selected rows, vocabulary] (None if "none" was requested) and, when the plan has labels, the mean
    `loss` over supervised rows; with "none" also each one's own, `losses` [supervised rows] float32, and the decoder's
    `inputs`."""

    logits: Tensor | None
    loss: Tensor | None = None
    losses: Tensor | None = None
    inputs: Inputs | None = None


class LlavaModel(VisualModel, ConfiguredModel):
    """A LLaVA of any variant, by its config. An ordinary nn.Module: gradients flow to all parameters that require them.
    Raises ValueError for a processor whose geometry gives another number of rows per tile than the config.
    """

    config: LlavaConfig

    def __init__(self, config: LlavaConfig, processor: Processor | None = None) -> None:
        super().__init__(config)
        if processor is not None:
            made, given = (geometry.tower_rows_per_tile for geometry in (processor.geometry, config.geometry))
            if made != given:
                raise ValueError(
                    f"the tower gives {given} rows per tile, but the processor's geometry has {made}: make it from "
                    "config.geometry"
                )
        self.processor = processor
        self.decoder = config.decoder.build()
        self.cuda_graphs = True
        """Encode images and decode from CUDA graphs where that can be done (generation.runner)."""
        self.runs_every_part = False
        """Run tower and projector on zero tiles if a batch has none, as sharded training requires."""

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer if self.processor is not None else None

    @property
    def connector_tokenizer(self) -> Any:
        told = None if self.processor is None else self.processor.instructions
        return None if told is None else told.tokenizer

    @property
    def own_processor(self) -> Processor:
        """`processor`. Raises RequestError if there is none."""
        if self.processor is None:
            raise RequestError("this model has no processor: build it with llava_fast.load, or pass one to LlavaModel")
        return self.processor

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def prepare(
        self,
        requests: list[dict],
        labels: bool = False,
        layout: Layout = "packed",
    ) -> Batch:
        """Tiles and plan of a batch of requests (see inputs.processor), on the model's device."""
        return Batch.from_prepared(self.own_processor.prepare(requests, labels, layout), self.device)

    def forward(self, batch: Batch, logits: Logits | None = None, inputs: Inputs | None = None) -> LlavaOutput:
        """Logits of the selected rows: each sequence's "last" (the default without labels), the "supervised" ones
        (the default with labels; the loss is over these), or "all" ([sequences, rows, vocabulary] if padded). "none" is
        for training: losses only, without materialising logits (ops.linear_cross_entropy); it also accepts a batch
        without sequences, with loss 0, for a process that has no samples in a step. A router first leaves out
        rows (`routed`), and "all" are those that remain.

        inputs  those of an earlier pass over the batch, so that tower and projector do not run again.

        Raises ValueError for an unknown choice, or for "supervised" or "none" on a batch without labels.
        """
        logits = logits or ("supervised" if batch.plan.has_labels else "last")
        if logits not in get_args(Logits):
            raise ValueError(f"logits must be one of {', '.join(map(repr, get_args(Logits)))}, got {logits!r}")
        idle = logits == "none" and not batch.plan.lengths
        if logits in ("supervised", "none") and not batch.plan.has_labels and not idle:
            raise ValueError("no row of this batch is supervised: prepare it with labels=True and an assistant's turn")
        inputs = self.routed(batch) if inputs is None else inputs
        batch, inputs_RC = inputs
        hidden_RC = self.hidden_states(inputs_RC, batch, batch.spans())
        if logits == "none":
            rows, target = batch.column("supervised_row").long(), batch.column("supervised_target")
            losses = self.decoder.losses(hidden_RC[rows], target)
            return LlavaOutput(None, losses.sum() / max(len(losses), 1), losses, inputs)
        every = self.decoder.logits(hidden_RC) if logits == "all" else None
        supervised = loss = None
        if batch.plan.has_labels:
            rows = batch.column("supervised_row").long()
            supervised = self.decoder.logits(hidden_RC[rows]) if every is None else every[rows]
            loss = F.cross_entropy(supervised.float(), batch.column("supervised_target").long())
        if every is not None:
            dense = batch.spans().dense
            return LlavaOutput(every.unflatten(0, dense) if dense else every, loss)
        if logits == "supervised" and supervised is not None:
            return LlavaOutput(supervised, loss)
        return LlavaOutput(self.decoder.logits(hidden_RC[batch.column("last_row").long()]), loss)

    def hidden_states(self, inputs_RC: Tensor, batch: Batch, spans: Spans, cache: PagedCache | None = None) -> Tensor:
        """Decoder outputs after the final norm, [rows, width]."""
        return self.decoder(inputs_RC, batch.column("position").long(), spans, cache)

    def inputs_embeds(self, batch: Batch) -> Tensor:
        """[rows, width]: text rows from the embedding table, visual rows from the projector, newlines (see encode); all
        rows of the batch, also optional ones."""
        made = None
        if not self.runs_every_part and batch.count("tile") is None:
            made = self.projected(batch.tiles, self._instruction(batch), self._tiles_read(batch))
        parts, features = made or (self._parts(batch), self._features(batch))
        return encode.inputs_embeds(parts, self.decoder.embed_tokens, features, batch.placement())[0]

    def routed(self, batch: Batch) -> Inputs:
        """The decoder's inputs, without the optional rows that the router leaves out. Their number depends on the
        images and on the text, so this waits for the device, and the plan is made again on the host.
        """
        rule = self.config.router
        if rule is None or not (self.runs_every_part or "optional_row" in batch.plan.sections):
            return Inputs(batch, self.inputs_embeds(batch))
        features, placement = self._features(batch), batch.placement()
        embedding = self.decoder.embed_tokens
        text_ids = self._routing_text(batch)
        with torch.no_grad():
            text_ILC = embedding(text_ids.clamp(min=0).long())
        if features is None or "optional_row" not in batch.plan.sections:
            return Inputs(batch, encode.inputs_embeds(self._parts(batch), embedding, features, placement)[0])
        visual = encode.visual_rows(self._parts(batch), features, placement)
        row, image = batch.column("optional_row").long(), batch.column("optional_image").long()
        with torch.no_grad():
            score = router.scores(visual[placement.row[row].long()], image, text_ILC, text_ids >= 0)
            if self.training:
                score = score + torch.randn_like(score) * router.NOISE
        stays = router.stays(score.cpu().numpy(), batch.plan.column("optional_image"), rule)
        left_out = np.zeros(batch.plan.rows, bool)
        left_out[batch.plan.column("optional_row")] = ~stays
        plan, used = without_rows(batch.plan, left_out)
        fewer = Batch(batch.tiles, plan, torch.from_numpy(plan.flat).to(batch.flat.device))
        visual = visual[torch.from_numpy(used).to(visual.device)]
        return Inputs(fewer, encode.placed_rows(self._parts(fewer), embedding, visual, fewer.placement()))

    def _parts(self, batch: Batch) -> encode.Parts:
        return self.parts(batch.plan.grids, self._instruction(batch), batch.plan.images)

    def _routing_text(self, batch: Batch) -> Tensor:
        """The ids of the text of each image, int32 [images, longest], padding -1."""
        if "instruction" not in batch.plan.sections:
            return batch.flat.new_zeros(0, 0)
        tiles = np.cumsum([0, *batch.plan.images])[:-1]
        return batch.column("instruction")[torch.from_numpy(tiles).to(batch.flat.device)]

    def _features(self, batch: Batch) -> Tensor | None:
        """The tower's rows of all tiles end to end [tiles * rows, features]; None without tiles, unless every part must
        run.
        """
        if not batch.plan.tiles and not self.runs_every_part:
            return None
        plan, read = batch.plan, self._tiles_read(batch)
        rows = self.features(batch.tiles, plan.grids, plan.videos, batch.count("tile"), self.runs_every_part)
        if read is None:
            return rows
        return rows.unflatten(0, (len(batch.tiles), -1))[read].flatten(0, 1)

    @staticmethod
    def _tiles_read(batch: Batch) -> Tensor | None:
        """Which tile the connector reads for each of its own, int64; None: they are the same."""
        return batch.column("tower_tile").long() if "tower_tile" in batch.plan.sections else None

    def _instruction(self, batch: Batch) -> Tensor | None:
        """The text that the connector reads with each tile, int32 [tiles, longest]; None if the plan has none."""
        if "instruction" in batch.plan.sections:
            return batch.column("instruction")
        return None if batch.plan.tiles else batch.flat.new_zeros(0, 0)
