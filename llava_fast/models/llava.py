"""LLaVA itself: tiles through tower and projector into their places among the text, then the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.inputs.plan import Layout
from llava_fast.inputs.processor import Processor
from llava_fast.models.attention import Spans
from llava_fast.models.batch import Batch
from llava_fast.models.config import LlavaConfig
from llava_fast.models.decoder import Decoder
from llava_fast.models.kv_cache import KVCache
from llava_fast.models.projector import Projector
from llava_fast.models.vision import VisionTower
from llava_fast.ops import mix_rows, token_pack

Logits = Literal["last", "supervised", "all"]


@dataclass(frozen=True)
class LlavaOutput:
    """`logits` [rows asked for, vocabulary] and, when the plan has labels, the mean `loss` over supervised rows."""

    logits: Tensor
    loss: Tensor | None = None


class LlavaModel(nn.Module):
    """A LLaVA of any variant, by its config. An ordinary nn.Module: gradients flow to whatever requires them."""

    def __init__(self, config: LlavaConfig, processor: Processor | None = None) -> None:
        super().__init__()
        self.config = config
        self.processor = processor
        self.vision_tower = VisionTower(config.vision)
        self.projector = Projector(config.projector)
        if config.has_newline:
            self.image_newline = nn.Parameter(torch.zeros(config.decoder.hidden_size))
        self.decoder = Decoder(config.decoder)

    @property
    def tokenizer(self):
        return self.processor.tokenizer if self.processor is not None else None

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    def prepare(
        self,
        requests: list[dict],
        labels: bool = False,
        layout: Layout = "packed",
        first_positions: list[int] | None = None,
    ) -> Batch:
        """Tiles and plan of a batch of requests (see inputs.processor), on the model's device."""
        return Batch.from_prepared(
            self.processor.prepare(requests, labels, layout, first_positions), self.device
        )

    def forward(self, batch: Batch, logits: Logits | None = None) -> LlavaOutput:
        """Logits of the rows asked for: each sequence's "last" (the default without labels), the "supervised" ones
        (the default with labels; the loss is over these), or "all" ([sequences, rows, vocabulary] if padded).

        Raises ValueError for an unknown choice.
        """
        logits = logits or ("supervised" if batch.plan.has_labels else "last")
        if logits not in ("last", "supervised", "all"):
            raise ValueError(f"logits must be 'last', 'supervised' or 'all', got {logits!r}")
        hidden_RC = self.hidden_states(self.inputs_embeds(batch), batch, batch.spans())
        supervised = None
        if batch.plan.has_labels:
            supervised = self.decoder.logits(hidden_RC[batch.column("supervised_row").long()])
        loss = None
        if supervised is not None:
            loss = F.cross_entropy(supervised.float(), batch.column("supervised_target").long())
        if logits == "supervised" and supervised is not None:
            return LlavaOutput(supervised, loss)
        if logits == "all":
            out = self.decoder.logits(hidden_RC)
            dense = batch.spans().dense
            return LlavaOutput(out.unflatten(0, dense) if dense else out, loss)
        rows = batch.column("last_row" if logits == "last" else "supervised_row").long()
        return LlavaOutput(self.decoder.logits(hidden_RC[rows]), loss)

    def hidden_states(
        self, inputs_RC: Tensor, batch: Batch, spans: Spans, cache: KVCache | None = None
    ) -> Tensor:
        """Decoder outputs after the final norm, [rows, width]."""
        return self.decoder(inputs_RC, batch.column("position").long(), spans, cache)

    def inputs_embeds(self, batch: Batch) -> Tensor:
        """[rows, width]: text rows from the embedding table, visual rows from the projector, newlines."""
        embedding = self.decoder.embed_tokens.weight
        constant = self.image_newline[None] if self.config.has_newline else embedding[:0]
        return token_pack(
            batch.column("source"), batch.column("row"), embedding, self.visual_rows(batch), constant
        )

    def visual_rows(self, batch: Batch) -> Tensor:
        """The plan's visual table [visual rows, width]: only rows that reach the decoder are projected."""
        mixes = batch.plan.mixes
        if not batch.plan.tiles:
            return self.decoder.embed_tokens.weight[:0]
        features = self.vision_tower(batch.tiles).flatten(0, 1)
        table = [features[batch.column("kept").long()]]
        for mix in (mix for mix in mixes if mix.stage == "before"):
            table.append(mix_rows(features, batch.column(mix.index), batch.weight(mix.weight), mix.reduce))
        projected = self.projector(torch.cat(table) if len(table) > 1 else table[0])
        table = [projected]
        for mix in (mix for mix in mixes if mix.stage == "after"):
            table.append(mix_rows(projected, batch.column(mix.index), batch.weight(mix.weight), mix.reduce))
        return torch.cat(table) if len(table) > 1 else projected
