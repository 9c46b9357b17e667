"""The decoder: a stack of layers over rows of many sequences at once, between embedding and head.

Shapes: R rows (all sequences end to end, see attention.Spans), C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models import fused
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.blocks.native_step import step_weights
from llava_fast.models.blocks.rope import Rope
from llava_fast.models.decoders.base import DecoderConfig, RowContext
from llava_fast.models.decoders.llama import DecoderAttention, DecoderLayer, DecoderMLP
from llava_fast.models.paged_cache import BLOCK_ROWS, PagedCache
from llava_fast.models.quantised import Quantised, QuantisedEmbedding, QuantisedLinear, like
from llava_fast.models.recompute import Recompute, run_layer
from llava_fast.ops.decoder_step import decoder_step
from llava_fast.ops.linear_cross_entropy import linear_cross_entropy

_PLAIN = frozenset({fused.RMSNorm, DecoderAttention, DecoderMLP, DecoderLayer, nn.Linear, QuantisedLinear})
"""What one decoder_step stands for."""


class Decoder(nn.Module):
    """Rows in, hidden states out; `logits` applies the (tied or own) head to the rows asked for."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(config.build_layer(layer) for layer in range(config.num_layers))
        self.norm = config.build_norm()
        self.rope = Rope(config.rope, config.head_dim, config.max_positions)
        self.recompute: Recompute = "none"
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x_RC: Tensor, position_R: Tensor, spans: Spans, cache: PagedCache | None = None) -> Tensor:
        """inputs_embeds [R, C] and position ids [R] to final hidden states [R, C]. With a cache, every sequence's table
        gets the blocks that it needs (CacheFullError if there are none); counting the new rows is the caller's part."""
        if cache is not None:
            for table, before, rows in zip(spans.tables, spans.before, spans.lengths, strict=True):
                table.reserve(before + rows)
        cos, sin = self.rope(position_R, x_RC.dtype, spans)
        if cache is not None and (weights := step_weights(self, _PLAIN, x_RC, spans)) is not None:
            tables = [table.runs for table in spans.tables]
            return decoder_step(x_RC, weights, cos, sin, cache.segments, tables, spans.before)
        context = RowContext((cos, sin), spans, cache)
        for layer in self.layers:
            x_RC = run_layer(self.recompute, layer, x_RC, context)
        return self.norm(x_RC)

    def steps_natively(self, x_RC: Tensor, spans: Spans) -> bool:
        """Whether `forward` with a cache would run these rows as one decoder_step, which gives each row what it would
        get alone, to the bit."""
        return step_weights(self, _PLAIN, x_RC, spans) is not None

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, C] -> [rows, vocabulary]."""
        if not self.config.tie_embeddings:
            return self.lm_head(hidden)
        table = self.embed_tokens
        return table.project(hidden) if isinstance(table, QuantisedEmbedding) else F.linear(hidden, table.weight)

    @property
    def dtype(self) -> torch.dtype:
        return like(self.embed_tokens).dtype

    @property
    def device(self) -> torch.device:
        return like(self.embed_tokens).device

    def losses(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood of each row's target: [rows, C], int [rows] -> float32 [rows]. Where the head is a
        plain layer, no table of logits is made."""
        tied = self.config.tie_embeddings
        head = self.embed_tokens if tied else self.lm_head
        if not isinstance(head, Quantised) and (tied or fused.is_plain(head, nn.Linear)):
            return linear_cross_entropy(hidden, head.weight, target)
        return F.cross_entropy(self.logits(hidden).float(), target.long(), reduction="none")

    def new_cache(self, max_bytes: int | None = None, keep_bytes: int = 0, block_rows: int = BLOCK_ROWS) -> PagedCache:
        """An empty cache for this decoder's rows; it takes memory as it is used. Arguments as for PagedCache."""
        config = self.config
        shape = (config.num_layers, config.num_kv_heads, config.head_dim)
        return PagedCache(*shape, self.dtype, self.device, max_bytes, keep_bytes, block_rows)
