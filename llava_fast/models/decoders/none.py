"""No decoder: the place of one in a model that only compares images and texts (models.retrieval)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_fast.models.blocks.attention import Spans
from llava_fast.models.decoders.base import BaseDecoder, DecoderConfig, Split
from llava_fast.models.paged_cache import PagedCache
from llava_fast.models.recompute import Recompute


@dataclass(frozen=True, kw_only=True)
class NoDecoderConfig(DecoderConfig):
    """Costs nothing. `hidden_size`: of the rows that it would get; `max_positions`: the most rows of a sample."""

    family = "none"

    vocab_size: int = 0
    num_layers: int = 0
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 1

    def build(self) -> NoDecoder:
        return NoDecoder(self)

    @property
    def layer_matrix_size(self) -> int:
        return 0

    def kept_per_row(self, itemsize: int) -> tuple[int, int]:
        return 0, 0

    @property
    def tensor_plan(self) -> dict[str, Split]:
        return {}

    @classmethod
    def from_hf(cls, hf: Any, tied: bool) -> DecoderConfig:
        raise ValueError("this model has no decoder")

    def to_hf(self) -> dict[str, Any]:
        return {}


class NoDecoder(BaseDecoder):
    """Without parameters."""

    def __init__(self, config: NoDecoderConfig) -> None:
        super().__init__()
        self.config: NoDecoderConfig = config
        self.layers = nn.ModuleList()
        self.recompute: Recompute = "none"

    def forward(self, x_RC: Tensor, position_R: Tensor, spans: Spans, cache: PagedCache | None = None) -> Tensor:
        raise ValueError("this model has no decoder: it compares images and texts (llava_fast.load_retrieval)")

    @property
    def device(self) -> torch.device:
        raise ValueError("this model has no decoder")
