"""The shape of a LLaVA checkpoint, in the field's own terms; built by `llava_fast.checkpoints`, read by models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from llava_fast.inputs.anyres import VisualGeometry


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP or SigLIP tower. `feature_layers` counts hidden states as transformers does: 0 is the embedding's
    output, k the output of layer k, negative counts from the last; several are concatenated feature-wise."""

    kind: Literal["clip", "siglip"]
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    activation: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]
    layer_norm_eps: float
    feature_layers: tuple[int, ...] = (-2,)
    keep_class_row: bool = False
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def has_class_row(self) -> bool:
        return self.kind == "clip"

    @property
    def drops_class_row(self) -> bool:
        """Whether the class row runs with the others and is then left out."""
        return self.has_class_row and not self.keep_class_row

    @property
    def patches_per_tile(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def layers_needed(self) -> int:
        """Layers that must run for the selected hidden states."""
        return max(layer if layer >= 0 else self.num_layers + 1 + layer for layer in self.feature_layers)

    @property
    def feature_size(self) -> int:
        return self.hidden_size * len(self.feature_layers)


@dataclass(frozen=True)
class ProjectorConfig:
    """From ViT features to decoder width. "mlp" has `depth` Linears with an activation between them; "yi" adds a
    LayerNorm after each of its two Linears (Yi-VL)."""

    kind: Literal["linear", "mlp", "identity", "yi"]
    in_features: int
    out_features: int
    depth: int = 2
    activation: Literal["gelu", "gelu_pytorch_tanh", "relu", "silu"] = "gelu"
    bias: bool = True

    @property
    def matrix_size(self) -> int:
        """Entries of its matrices; each costs a row a multiplication and an addition."""
        if self.kind == "identity":
            return 0
        depth = 1 if self.kind == "linear" else self.depth
        return self.out_features * (self.in_features + (depth - 1) * self.out_features)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: kind "default", "linear", "dynamic" or "llama3" (transformers' names and maths)."""

    kind: Literal["default", "linear", "dynamic", "llama3"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-family decoder: Llama, Vicuna, Mistral (GQA, sliding window), Qwen1.5/2 (QKV bias), Yi."""

    family: Literal["llama", "mistral", "qwen2"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    sliding_windows: tuple[int | None, ...] | None = None

    @property
    def layer_matrix_size(self) -> int:
        """Entries of a layer's matrices; each costs a row a multiplication and an addition."""
        attention = self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def context_length(self) -> int:
        """Positions the decoder is made for: stretched by linear and dynamic RoPE scaling."""
        stretched = self.rope.factor if self.rope.kind in ("linear", "dynamic") else 1.0
        return int(self.max_positions * stretched)

    def window_of(self, layer: int) -> int | None:
        """Keys a query of this layer may look back on, itself included; None: all."""
        return self.sliding_windows[layer] if self.sliding_windows else None


@dataclass(frozen=True)
class LlavaConfig:
    """A whole checkpoint. `source` is its config.json as read, kept so that saving returns every field."""

    vision: VisionConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    geometry: VisualGeometry
    layout: Literal["hf", "original"]
    model_type: str
    image_token_id: int
    video_token_id: int | None = None
    has_newline: bool = False
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    source: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = self.vision.patches_per_tile + self.vision.has_class_row
        if self.geometry.tower_rows_per_tile != given:
            raise ValueError(
                f"the tower gives {given} rows a tile, and the geometry counts {self.geometry.tower_rows_per_tile}: "
                "set its tile_size and patch_size, and class_rows or dropped_rows to 1 for a CLIP tower"
            )
