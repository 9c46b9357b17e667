"""The decoder: a stack of layers over rows of many sequences at once, between embedding and head.

Shapes: R rows (all sequences end to end, see attention.Spans), C width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from llava_fast.models import fused
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.blocks.native_step import step_weights
from llava_fast.models.blocks.rope import Rope
from llava_fast.models.decoders.base import BaseDecoder, RowContext, StackConfig, reserve
from llava_fast.models.decoders.llama import DecoderAttention, DecoderLayer, DecoderMLP, PreNormLayer
from llava_fast.models.eight_bit import EightBitLinear
from llava_fast.models.paged_cache import PagedCache, Pages
from llava_fast.models.quantised import QuantisedLinear
from llava_fast.models.recompute import Recompute, run_layer
from llava_fast.ops.decoder_step import decoder_step

_LINEARS = {nn.Linear, QuantisedLinear, EightBitLinear}  # the last multiplies few rows as nn.Linear does
_PLAIN = frozenset({fused.RMSNorm, DecoderAttention, DecoderMLP, DecoderLayer, *_LINEARS})
"""The module types that one decoder_step replaces."""


class Decoder(BaseDecoder):
    """A stack of this package's layers."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config: StackConfig = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(config.build_layer(layer) for layer in range(config.num_layers))
        self.norm = config.build_norm()
        self.rope = Rope(config.rope, config.head_dim, config.max_positions)
        self.recompute: Recompute = "none"
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        x_RC: Tensor,
        position_R: Tensor,
        spans: Spans,
        cache: PagedCache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        if cache is not None:
            reserve(spans)
        cos, sin = self.rope(position_R, x_RC.dtype, spans)
        scale = None if self.training else self.config.query_scale(position_R, spans.reach)
        if (
            scale is None
            and cache is not None
            and not self.layer_groups
            and (weights := step_weights(self, _PLAIN, x_RC, spans)) is not None
        ):
            tables = [table.runs for table in spans.tables]
            x_RC = decoder_step(x_RC, weights, cos, sin, cache.segments, tables, spans.before)
            return x_RC if wanted is None else x_RC[wanted]
        if torch.is_grad_enabled():
            context = RowContext((cos, sin), spans, cache, query_scale=scale)
            home = x_RC.device
            for layer, own in self._placed(context):
                x_RC = run_layer(self.recompute, layer, x_RC.to(own.rotation[0].device), own)
            x_RC = self.norm(x_RC.to(home))
            return x_RC if wanted is None else x_RC[wanted]
        pages = None
        if cache is not None and cache.codes is None and not self.layer_groups and set(spans.lengths) == {1}:
            pages = cache.pages(spans.tables, spans.before) if fused.takes("paged_attention", x_RC) else None
        return self._run(x_RC, RowContext((cos, sin), spans, cache, pages, query_scale=scale), wanted)

    def rows_of(
        self, x_RC: Tensor, position_R: Tensor, spans: Spans, cache: PagedCache | None, wanted: Tensor
    ) -> Tensor:
        return self(x_RC, position_R, spans, cache, wanted)

    def step(self, token_R: Tensor, pages: Pages, cache: PagedCache) -> Tensor:
        """Logits [R, vocabulary] after one more token of each sequence, int [R], from tensors on the device only, so
        that a CUDA graph can capture it. The rope's table must be long enough (`rope.reserve`) and tables must have
        their blocks.
        """
        x_RC = self.embed_tokens(token_R)
        position_R = pages.before.clamp(min=0)
        context = RowContext(
            self.rope.at(position_R), Spans((), ()), cache, pages, query_scale=self.config.query_scale(position_R)
        )
        return self.logits(self._run(x_RC, context))

    def _run(self, x_RC: Tensor, context: RowContext, wanted: Tensor | None = None) -> Tensor:
        """All layers and the final norm, without gradients: each layer's last add is fused with the next norm. Rows
        that are not wanted end after the last layer's attention."""
        delta_RC, home = None, x_RC.device
        for layer, own in self._placed(context, wanted):
            x_RC, delta_RC = _moved(x_RC, delta_RC, own.rotation[0].device)
            if isinstance(layer, PreNormLayer) and _defers(layer):
                x_RC, delta_RC = layer.deferred(x_RC, delta_RC, own)
            else:
                x_RC, delta_RC = layer(x_RC if delta_RC is None else x_RC + delta_RC, own), None
        x_RC, delta_RC = _moved(x_RC, delta_RC, home)
        if wanted is not None and len(x_RC) > len(wanted):  # the layer returned all
            x_RC, delta_RC = x_RC[wanted], None if delta_RC is None else delta_RC[wanted]
        return fused.add_norm(x_RC, delta_RC, self.norm)[1]

    def _placed(self, context: RowContext, wanted: Tensor | None = None) -> Iterator[tuple[nn.Module, RowContext]]:
        """Each layer, and the context on its device; the last one's with the wanted rows."""
        groups = {first: device for device, first in self.layer_groups}
        own = context
        for number, layer in enumerate(self.layers):
            if number in groups:
                own = context.on(groups[number], number)
            if wanted is not None and number == len(self.layers) - 1:
                own = replace(own, wanted=wanted.to(own.rotation[0].device))
            yield layer, own

    def _apply(self, fn, recurse: bool = True):
        """As nn.Module's; a decoder that was moved to one device is no longer spread out."""
        super()._apply(fn, recurse)
        if self.layer_groups and len({parameter.device for parameter in self.parameters()}) == 1:
            self.layer_groups = ()
        return self

    def steps_natively(self, x_RC: Tensor, spans: Spans) -> bool:
        if (
            self.layer_groups
            or x_RC.dtype != torch.float32
            or any(isinstance(module, QuantisedLinear) for module in self.modules())
        ):
            return False  # not tested for other weights
        return step_weights(self, _PLAIN, x_RC, spans) is not None


def _defers(layer: PreNormLayer) -> bool:
    """Whether `deferred` may be called in place of the layer: nobody hooked or replaced its forward."""
    return type(layer).forward is PreNormLayer.forward and fused.is_untouched(layer, type(layer))


def _moved(x: Tensor, delta: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    return x.to(device), None if delta is None else delta.to(device)
