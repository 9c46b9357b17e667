"""The decoder: a Llama-family transformer over rows of many sequences at once.

Shapes: R rows (all sequences end to end, see attention.Spans), C width, H query heads, K key heads, D head size.
Parameter names are transformers'. Sources: Touvron et al. 2023 (Llama 2), Jiang et al. 2023 (Mistral), Bai et al.
2023 (Qwen), Su et al. 2021 (RoPE).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models import fused
from llava_fast.models.attention import Spans, attend
from llava_fast.models.config import DecoderConfig
from llava_fast.models.fused import MergesLinears, RMSNorm
from llava_fast.models.kv_cache import KVCache
from llava_fast.models.native_step import step_weights
from llava_fast.models.recompute import Recompute, run_layer
from llava_fast.models.rope import Rope
from llava_fast.ops.decoder_step import decoder_step
from llava_fast.ops.linear_cross_entropy import linear_cross_entropy


class DecoderAttention(MergesLinears):
    merges = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.window_of(layer)
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.o_bias)

    def forward(self, x_RC: Tensor, rotation: tuple[Tensor, Tensor], spans: Spans, cache: KVCache | None) -> Tensor:
        projected = self.project(x_RC, "qkv_proj")
        query_RHD, key_RKD, value_RKD = (rows.unflatten(-1, (-1, self.head_dim)) for rows in projected)
        query_RHD, key_RKD = fused.rotated(query_RHD, key_RKD, rotation)
        return self.o_proj(attend(query_RHD, key_RKD, value_RKD, spans, self.layer, cache, self.window))


class DecoderMLP(MergesLinears):
    """SwiGLU (Shazeer 2020)."""

    merges = {"gate_up_proj": ("gate_proj", "up_proj")}

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(fused.gated(*self.project(x, "gate_up_proj")))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(config, layer)
        self.mlp = DecoderMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_RC: Tensor, rotation: tuple[Tensor, Tensor], spans: Spans, cache: KVCache | None) -> Tensor:
        change_RC = self.self_attn(self.input_layernorm(x_RC), rotation, spans, cache)
        x_RC, normed_RC = fused.add_norm(x_RC, change_RC, self.post_attention_layernorm)
        return x_RC + self.mlp(normed_RC)


_PLAIN = frozenset({RMSNorm, DecoderAttention, DecoderMLP, DecoderLayer, nn.Linear})


class Decoder(nn.Module):
    """Rows in, hidden states out; `logits` applies the (tied or own) head to the rows asked for."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config.rope, config.head_dim, config.max_positions)
        self.recompute: Recompute = "none"
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x_RC: Tensor, position_R: Tensor, spans: Spans, cache: KVCache | None = None) -> Tensor:
        """inputs_embeds [R, C] and position ids [R] to final hidden states [R, C]."""
        rotation = self.rope(position_R, x_RC.dtype, spans)
        if cache is not None and (weights := step_weights(self, _PLAIN, x_RC, spans)) is not None:
            cache.require(max(spans.before) + 1)
            return decoder_step(x_RC, weights, *rotation, cache.keys, cache.values, spans.before)
        for layer in self.layers:
            x_RC = run_layer(self.recompute, layer, x_RC, rotation, spans, cache)
        return self.norm(x_RC)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, C] -> [rows, vocabulary]."""
        return F.linear(hidden, self.embed_tokens.weight) if self.config.tie_embeddings else self.lm_head(hidden)

    def losses(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood of each row's target: [rows, C], int [rows] -> float32 [rows]. Where the head is a
        plain layer, no table of logits is made."""
        tied = self.config.tie_embeddings
        if tied or fused.is_plain(self.lm_head, nn.Linear):
            return linear_cross_entropy(hidden, (self.embed_tokens if tied else self.lm_head).weight, target)
        return F.cross_entropy(self.logits(hidden).float(), target.long(), reduction="none")

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        config, weight = self.config, self.embed_tokens.weight
        return KVCache(
            config.num_layers,
            slots,
            config.num_kv_heads,
            capacity,
            config.head_dim,
            weight.dtype,
            weight.device,
        )
