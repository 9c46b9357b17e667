"""The LLaVA model: tiles run through tower and projector and are placed among the text, then the decoder runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast.errors import RequestError
from llava_fast.inputs.plan.plan import Layout
from llava_fast.inputs.processor import Processor
from llava_fast.models import encode
from llava_fast.models.batch import Batch
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.config import ConfiguredModel, LlavaConfig
from llava_fast.models.paged_cache import PagedCache
from llava_fast.models.visual import VisualModel

Logits = Literal["last", "supervised", "all", "none"]


@dataclass(frozen=True)
class LlavaOutput:
    """`logits` [selected rows, vocabulary] (None if "none" was requested) and, when the plan has labels, the mean
    `loss` over supervised rows; with "none" also each one's own, `losses` [supervised rows] float32, and the decoder's
    `inputs_embeds` [rows, width]."""

    logits: Tensor | None
    loss: Tensor | None = None
    losses: Tensor | None = None
    inputs_embeds: Tensor | None = None


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

    def forward(self, batch: Batch, logits: Logits | None = None, inputs_embeds: Tensor | None = None) -> LlavaOutput:
        """Logits of the selected rows: each sequence's "last" (the default without labels), the "supervised" ones
        (the default with labels; the loss is over these), or "all" ([sequences, rows, vocabulary] if padded). "none" is
        for training: losses only, without materialising logits (ops.linear_cross_entropy); it also accepts a batch
        without sequences, with loss 0, for a process that has no samples in a step.

        inputs_embeds  those of an earlier pass over the batch, so that tower and projector do not run again.

        Raises ValueError for an unknown choice, or for "supervised" or "none" on a batch without labels.
        """
        logits = logits or ("supervised" if batch.plan.has_labels else "last")
        if logits not in get_args(Logits):
            raise ValueError(f"logits must be one of {', '.join(map(repr, get_args(Logits)))}, got {logits!r}")
        idle = logits == "none" and not batch.plan.lengths
        if logits in ("supervised", "none") and not batch.plan.has_labels and not idle:
            raise ValueError("no row of this batch is supervised: prepare it with labels=True and an assistant's turn")
        inputs_RC = self.inputs_embeds(batch) if inputs_embeds is None else inputs_embeds
        hidden_RC = self.hidden_states(inputs_RC, batch, batch.spans())
        if logits == "none":
            rows, target = batch.column("supervised_row").long(), batch.column("supervised_target")
            losses = self.decoder.losses(hidden_RC[rows], target)
            return LlavaOutput(None, losses.sum() / max(len(losses), 1), losses, inputs_RC)
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
        """[rows, width]: text rows from the embedding table, visual rows from the projector, newlines (see encode)."""
        instruction, parts, features = self._instruction(batch), None, None
        if not self.runs_every_part and batch.count("tile") is None:
            parts, features = self.projected(batch.tiles, instruction, self._tiles_read(batch)) or (None, None)
        if parts is None:
            parts, features = self.parts(batch.plan.grids, instruction), self._features(batch)
        return encode.inputs_embeds(parts, self.decoder.embed_tokens, features, batch.placement())[0]

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
