"""Qwen 3's decoder: Llama's with an RMSNorm over each head of the queries and keys, before their rotation.

Shapes: R rows, C width, H query heads, K key heads, D head size. Parameter names are transformers'.
Sources: Qwen Team 2025 (Qwen3); Henry et al. 2020 (query and key normalisation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llava_fast.models.decoders.base import Split
from llava_fast.models.decoders.llama import DecoderAttention, LayerSpec, LlamaConfig, Qwen2Config
from llava_fast.models.fused import RMSNorm


class Qwen3Attention(DecoderAttention):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def heads(self, x_RC: Tensor) -> tuple[Tensor, ...]:
        query_RHD, key_RKD, value_RKD = super().heads(x_RC)
        return self.q_norm(query_RHD), self.k_norm(key_RKD), value_RKD


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """Qwen 3: no biases by default, an explicit head_dim, windows by layer as in Qwen 2."""

    family = "qwen3"
    spec = LayerSpec(attention=Qwen3Attention)

    def kept_per_row(self, itemsize: int) -> tuple[int, int]:
        everything, products = super().kept_per_row(itemsize)
        heads = self.head_dim * (self.num_heads + self.num_kv_heads)
        return everything + (4 + itemsize) * heads, products  # what the two norms read, in float32, and rounded

    @property
    def tensor_plan(self) -> dict[str, Split]:
        return super().tensor_plan | {"self_attn.q_norm": "shared", "self_attn.k_norm": "shared"}

    @classmethod
    def _own_choices(cls, hf: Any) -> dict[str, Any]:
        return super()._own_choices(hf) | {"qkv_bias": bool(hf.attention_bias)}

    def _own_fields(self) -> dict[str, Any]:
        return super()._own_fields() | {"attention_bias": self.o_bias}
