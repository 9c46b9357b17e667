"""Qwen's first decoder: one Linear for query, key and value, an MLP gated by its second Linear, and beyond the trained
length a larger RoPE base (NTK) and queries scaled by the logarithm of their position.

Shapes: R rows (all sequences end to end, see attention.Spans), C width, H heads, D head size. Parameter names are those
of the published checkpoints. Neither extension has an effect in training, as in the original. Sources: Bai et al. 2023
(Qwen); QwenLM/Qwen modeling_qwen.py, as in Yuliang-Liu/Monkey 498e1d9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from llava_fast.models import fused
from llava_fast.models.blocks.rope import RopeConfig
from llava_fast.models.decoders.base import RowContext, Split, StackConfig
from llava_fast.models.decoders.llama import PreNormLayer, attended
from llava_fast.models.fused import RMSNorm
from llava_fast.storage.bounds import Layers, Positive, Size
from llava_fast.storage.files import Fields

Positions = Annotated[int, Field(ge=1, le=2**31)]


class QwenFields(Fields):
    """The decoder's fields in config.json."""

    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    kv_channels: Size
    layer_norm_epsilon: Positive
    rotary_emb_base: Positive
    rotary_pct: Positive
    scale_attn_weights: bool
    seq_length: Annotated[int, Field(ge=2, le=2**31)]
    max_position_embeddings: Positions
    use_dynamic_ntk: bool
    use_logn_attn: bool
    no_bias: bool


class QwenAttention(nn.Module):
    def __init__(self, config: QwenConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.biases)

    def forward(self, x_RC: Tensor, context: RowContext) -> Tensor:
        query, key, value = (rows.unflatten(-1, (-1, self.head_dim)) for rows in self.c_attn(x_RC).chunk(3, dim=-1))
        if context.query_scale is not None:  # before rotation, which is linear
            query = query * context.query_scale.to(query.dtype)
        return self.c_proj(attended(query, key, value, context, self.layer))


class QwenMLP(nn.Module):
    """SwiGLU (Shazeer 2020); `w2` is the gate."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(width, inner, bias=config.biases)
        self.w2 = nn.Linear(width, inner, bias=config.biases)
        self.c_proj = nn.Linear(inner, width, bias=config.biases)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(fused.gated(self.w2(x), self.w1(x)))


class QwenLayer(PreNormLayer):
    def __init__(self, config: QwenConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = config.build_norm()
        self.attn = QwenAttention(config, layer)
        self.ln_2 = config.build_norm()
        self.mlp = QwenMLP(config)

    def deferred(self, x_RC: Tensor, delta_RC: Tensor | None, context: RowContext) -> tuple[Tensor, Tensor]:
        x_RC, normed_RC = fused.add_norm(x_RC, delta_RC, self.ln_1)
        attended_RC = self.attn(normed_RC, context)
        if context.wanted is not None:
            x_RC = x_RC[context.wanted]
        x_RC, normed_RC = fused.add_norm(x_RC, attended_RC, self.ln_2)
        return x_RC, self.mlp(normed_RC)


@dataclass(frozen=True, kw_only=True)
class QwenConfig(StackConfig):
    """Qwen 1 (config.json's model_type qwen). intermediate_size is that of one Linear, half of config.json's.

    trained_length  beyond it (seq_length), rope "by_prompt" and `log_n` have an effect.
    log_n           queries at position p > trained_length are scaled by log(p) / log(trained_length), p from 1.
    """

    family = "qwen"
    hf_fields: ClassVar[type[Fields] | None] = QwenFields

    intermediate_size: int
    layer_norm_eps: float
    trained_length: int
    log_n: bool = True
    biases: bool = False

    @property
    def context_length(self) -> int:
        return round(self.max_positions * self.rope.factor)

    @property
    def reference_length(self) -> int | None:
        return self.trained_length if self.log_n else super().reference_length

    def query_scale(self, position_R: Tensor, reach: int | None = None) -> Tensor | None:
        if not self.log_n or (reach is not None and reach <= self.trained_length):
            return None
        scale_R = (position_R.double() + 1).log() / math.log(self.trained_length)
        return scale_R.float().clamp(min=1)[:, None, None]

    def build_layer(self, layer: int) -> QwenLayer:
        return QwenLayer(self, layer)

    def build_norm(self) -> RMSNorm:
        return RMSNorm(self.hidden_size, self.layer_norm_eps)

    @property
    def layer_matrix_size(self) -> int:
        return self.hidden_size * (4 * self.hidden_size + 3 * self.intermediate_size)

    def kept_per_row(self, itemsize: int) -> tuple[int, int]:
        width, inner = self.hidden_size, self.intermediate_size
        everything = 8 * width + itemsize * (8 * width + 4 * inner)  # as a Llama with as many key heads
        return everything, itemsize * (6 * width + 2 * inner)

    @property
    def tensor_plan(self) -> dict[str, Split]:
        """Not split: one weight holds query, key and value."""
        return {}

    @classmethod
    def from_hf(cls, hf: Any, tied: bool) -> QwenConfig:
        if hf.kv_channels * hf.num_attention_heads != hf.hidden_size or hf.kv_channels % 2:
            raise ValueError(
                f"{hf.num_attention_heads} num_attention_heads of {hf.kv_channels} kv_channels do not make a "
                f"hidden_size of {hf.hidden_size}"
            )
        for field, only in (("rotary_pct", 1.0), ("scale_attn_weights", True)):
            if getattr(hf, field) != only:
                raise ValueError(f"{field} is {getattr(hf, field)!r}; supported is {only}")
        if hf.intermediate_size % 2:
            raise ValueError(f"intermediate_size is {hf.intermediate_size}; two Linears share it, so it must be even")
        if hf.max_position_embeddings < hf.seq_length:
            raise ValueError(
                f"max_position_embeddings is {hf.max_position_embeddings}, less than a seq_length of {hf.seq_length}"
            )
        rope, positions = RopeConfig(theta=float(hf.rotary_emb_base)), hf.max_position_embeddings
        if hf.use_dynamic_ntk:
            factor = hf.max_position_embeddings / hf.seq_length
            rope, positions = RopeConfig("by_prompt", float(hf.rotary_emb_base), factor), hf.seq_length
        return cls(
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size // 2,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_attention_heads,
            head_dim=hf.kv_channels,
            max_positions=positions,
            layer_norm_eps=hf.layer_norm_epsilon,
            trained_length=hf.seq_length,
            rope=rope,
            log_n=hf.use_logn_attn,
            biases=not hf.no_bias,
            tie_embeddings=tied,
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 2 * self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "kv_channels": self.head_dim,
            "layer_norm_epsilon": self.layer_norm_eps,
            "rotary_emb_base": self.rope.theta,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "seq_length": self.trained_length,
            "max_position_embeddings": self.context_length,
            "use_dynamic_ntk": self.rope.kind == "by_prompt",
            "use_logn_attn": self.log_n,
            "no_bias": not self.biases,
            "tie_word_embeddings": self.tie_embeddings,
        }
