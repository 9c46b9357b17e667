"""Llama's decoder layer, and the families that differ from it only in their config: Mistral and Qwen 1.5 and 2.

Shapes: R rows (all sequences end to end, see attention.Spans), C width, H query heads, K key heads, D head size.
Parameter names are transformers'. Sources: Touvron et al. 2023 (Llama 2), Jiang et al. 2023 (Mistral), Bai et al.
2023 (Qwen), Su et al. 2021 (RoPE).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from llava_fast.models import fused
from llava_fast.models.blocks.attention import attend
from llava_fast.models.blocks.rope import RopeConfig
from llava_fast.models.decoders.base import RowContext, Split, StackConfig
from llava_fast.models.fused import MergesLinears, RMSNorm
from llava_fast.ops import paged_attention


class DecoderAttention(MergesLinears):
    merges: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    by_op = True

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.window_of(layer)
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.o_bias)

    def forward(self, x_RC: Tensor, context: RowContext) -> Tensor:
        query_RHD, key_RKD, value_RKD = self.heads(x_RC)
        rows = attended(query_RHD, key_RKD, value_RKD, context, self.layer, self.window)
        return fused.applied(self.o_proj, rows)

    def heads(self, x_RC: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values before rotation, each [R, heads, D]."""
        return tuple(rows.unflatten(-1, (-1, self.head_dim)) for rows in self.project(x_RC, "qkv_proj"))


def attended(
    query_RHD: Tensor, key_RKD: Tensor, value_RKD: Tensor, context: RowContext, layer: int, window: int | None = None
) -> Tensor:
    """Rotated and attended: [R, H * D], or of the wanted rows alone. Arguments as for `attend`."""
    if context.cache is not None and context.pages is not None:
        rows, pages = (query_RHD, key_RKD, value_RKD, *context.rotation), context.pages
        found = paged_attention(*rows, context.cache.segments, *pages, layer=layer, window=window)
    else:
        query_RHD, key_RKD = fused.rotated(query_RHD, key_RKD, context.rotation)
        found = attend(query_RHD, key_RKD, value_RKD, context.spans, layer, context.cache, window)
    return found if context.wanted is None else found[context.wanted]


class DecoderMLP(MergesLinears):
    """SwiGLU (Shazeer 2020)."""

    merges: ClassVar = {"gate_up_proj": ("gate_proj", "up_proj")}
    by_op = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return fused.applied(self.down_proj, fused.gated(*self.project(x, "gate_up_proj")))


class PreNormLayer(nn.Module, ABC):
    """A pre-norm layer with residual connections, whose last add the next layer may fuse with its norm."""

    def forward(self, x_RC: Tensor, context: RowContext) -> Tensor:
        x_RC, delta_RC = self.deferred(x_RC, None, context)
        return x_RC + delta_RC

    @abstractmethod
    def deferred(self, x_RC: Tensor, delta_RC: Tensor | None, context: RowContext) -> tuple[Tensor, Tensor]:
        """(x, delta): the MLP's output is not added yet; the next layer's fused add + norm adds it. The layer's own
        input is x + delta (None: x)."""


class DecoderLayer(PreNormLayer):
    """Its LayerSpec names the parts."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = config.spec.attention(config, layer)
        self.mlp = config.spec.mlp(config)
        self.input_layernorm = config.build_norm()
        self.post_attention_layernorm = config.build_norm()

    def deferred(self, x_RC: Tensor, delta_RC: Tensor | None, context: RowContext) -> tuple[Tensor, Tensor]:
        x_RC, normed_RC = fused.add_norm(x_RC, delta_RC, self.input_layernorm)
        attended_RC = self.self_attn(normed_RC, context)
        if context.wanted is not None:
            x_RC = x_RC[context.wanted]
        x_RC, normed_RC = fused.add_norm(x_RC, attended_RC, self.post_attention_layernorm)
        return x_RC, self.mlp(normed_RC)


@dataclass(frozen=True)
class LayerSpec:
    """The classes a layer is made of: attention(config, layer), called as (rows, RowContext), and mlp(config)."""

    attention: Callable[[LlamaConfig, int], nn.Module] = DecoderAttention
    mlp: Callable[[LlamaConfig], nn.Module] = DecoderMLP


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(StackConfig):
    """Llama and Vicuna (and Yi, whose checkpoints have model_type llama)."""

    family = "llama"
    original_type = "llava_llama"
    spec: ClassVar[LayerSpec] = LayerSpec()

    intermediate_size: int
    rms_norm_eps: float
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    def build_layer(self, layer: int) -> DecoderLayer:
        return DecoderLayer(self, layer)

    def build_norm(self) -> RMSNorm:
        return RMSNorm(self.hidden_size, self.rms_norm_eps)

    @property
    def layer_matrix_size(self) -> int:
        attention = self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    def kept_per_row(self, itemsize: int) -> tuple[int, int]:
        width, heads, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        inner = 4 * self.intermediate_size  # gate, up, silu(gate), their product
        everything = 8 * width + itemsize * (4 * width + 2 * heads + 2 * kv + inner)  # both norms' inputs in float32
        return everything, itemsize * (2 * width + 2 * heads + 2 * kv + 2 * self.intermediate_size)

    @property
    def tensor_plan(self) -> dict[str, Split]:
        """Megatron's split: one all-reduce for the attention and one for the MLP."""
        columns = [*(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
        plan: dict[str, Split] = dict.fromkeys(columns, "columns")
        plan.update(dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), "rows"))
        return plan

    @classmethod
    def from_hf(cls, hf: Any, tied: bool) -> LlamaConfig:
        if hf.hidden_act != "silu":
            raise ValueError(f"text_config.hidden_act is {hf.hidden_act!r}; supported are silu")
        kv_heads = hf.num_key_value_heads or hf.num_attention_heads
        head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        if hf.num_attention_heads % kv_heads or head_dim % 2 or not head_dim:
            raise ValueError(
                f"{hf.num_attention_heads} num_attention_heads, {kv_heads} num_key_value_heads and a head_dim of "
                f"{head_dim} do not go together"
            )
        return cls(
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=hf.max_position_embeddings,
            rms_norm_eps=hf.rms_norm_eps,
            rope=RopeConfig.from_hf(hf),
            tie_embeddings=tied,
            **cls._own_choices(hf),
        )

    @classmethod
    def _own_choices(cls, hf: Any) -> dict[str, Any]:
        """Biases and windows from this family's config."""
        bias = bool(getattr(hf, "attention_bias", False))
        return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(getattr(hf, "mlp_bias", False))}

    def to_hf(self) -> dict[str, Any]:
        fields = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "tie_word_embeddings": self.tie_embeddings,
        }
        if self.rope.kind != "default":
            fields["rope_scaling"] = self.rope.scaling() | {"type": self.rope.kind}  # named so before 4.43
        return fields | self._own_fields()

    def _own_fields(self) -> dict[str, Any]:
        """The inverse of _own_choices."""
        return {"attention_bias": self.o_bias, "mlp_bias": self.mlp_bias}


@dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """Mistral: grouped query heads, and one sliding window for all layers or none."""

    family = "mistral"
    original_type = "llava_mistral"

    @classmethod
    def _own_choices(cls, hf: Any) -> dict[str, Any]:
        windows = None if hf.sliding_window is None else (hf.sliding_window,) * hf.num_hidden_layers
        return super()._own_choices(hf) | {"sliding_windows": windows}

    def _own_fields(self) -> dict[str, Any]:
        return {"sliding_window": self.window_of(0)}


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """Qwen 1.5 and 2: biases in query, key and value, and windows by layer."""

    family = "qwen2"
    original_type = "llava_qwen"

    @classmethod
    def _own_choices(cls, hf: Any) -> dict[str, Any]:
        kinds = hf.layer_types
        windows = tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in kinds)
        chosen = super()._own_choices(hf) | {"qkv_bias": True}
        return chosen | {"sliding_windows": windows if "sliding_attention" in kinds else None}

    def _own_fields(self) -> dict[str, Any]:
        windows = self.sliding_windows or (None,) * self.num_layers
        return {
            "use_sliding_window": any(windows),
            "sliding_window": next((window for window in windows if window), None),
            "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        }
