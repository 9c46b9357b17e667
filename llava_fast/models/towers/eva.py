"""EVA's ViT-g, the tower of BLIP-2 and InstructBLIP: a class row, learned positions, one product for query, key and
value, and a LayerNorm after the last layer.

Shapes: T tiles, N rows per tile (the class row, then patches), C width. Parameter names are those of transformers'
Blip2VisionModel. The last LayerNorm's epsilon is the config's (1e-6) as in transformers; the original code has 1e-5.
Sources: Fang et al. 2022 (EVA); transformers 5.24 modeling_blip_2.py; salesforce/LAVIS 506965b eva_vit.py, blip2.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models import fused
from llava_fast.models.recompute import Recompute, run_layer
from llava_fast.models.towers.base import Tower, VisionFields
from llava_fast.models.towers.vit import ClipConfig, VisionMLP, VitConfig, embed_patches, prepare_tiles


class EvaFields(VisionFields):
    """A BLIP-2 vision config."""

    qkv_bias: bool


@dataclass(frozen=True, kw_only=True)
class EvaConfig(VitConfig):
    """EVA's ViT-g without its own head. Its feature is the last layer's output after the last LayerNorm; ValueError for
    another `feature_layers`."""

    kind = "eva"
    leading_rows = 1
    hf4_prefix = ""
    hf_fields = EvaFields
    own_normalisation = ClipConfig.own_normalisation

    qkv_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feature_layers != (-1,):
            raise ValueError(f"feature_layers are {self.feature_layers}: of this tower only (-1,) is supported")

    def build(self) -> EvaTower:
        return EvaTower(self)

    @classmethod
    def from_hf(cls, hf: Any, **choices: Any) -> EvaConfig:
        return super().from_hf(hf, qkv_bias=hf.qkv_bias, **choices)

    def to_hf(self) -> dict[str, Any]:
        fields = super().to_hf() | {"qkv_bias": self.qkv_bias}
        del fields["num_channels"]
        return fields


class InstructBlipVisionConfig(EvaConfig):
    """The same tower under transformers' other name."""


class InstructBlipVideoVisionConfig(EvaConfig):
    """And under its third."""


class EvaEmbeddings(nn.Module):
    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, patch, patch)
        self.position_embedding = nn.Parameter(torch.zeros(1, config.rows_per_tile, width))

    def forward(self, tiles: Tensor, mean: Tensor, std: Tensor, count: Tensor | None = None) -> Tensor:
        position, class_row = self.position_embedding[0], self.class_embedding[0, 0]
        return embed_patches(self.patch_embedding, tiles, position, class_row, mean, std, count)


class EvaAttention(nn.Module):
    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.projection = nn.Linear(width, width)

    def project(self, x_TNC: Tensor) -> Tensor:
        """Queries, keys and values [T, N, 3C]."""
        return self.qkv(x_TNC)

    def forward(self, x_TNC: Tensor) -> Tensor:
        query, key, value = self.project(x_TNC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out_THND = F.scaled_dot_product_attention(query, key, value)
        return self.projection(out_THND.transpose(1, 2).flatten(2))


class EvaLayer(nn.Module):
    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.self_attn = EvaAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_TNC: Tensor) -> Tensor:
        x_TNC, normed_TNC = fused.add_norm(x_TNC, None, self.layer_norm1)
        x_TNC, normed_TNC = fused.add_norm(x_TNC, self.self_attn(normed_TNC), self.layer_norm2)
        return x_TNC + self.mlp(normed_TNC)


class EvaTower(Tower):
    """uint8 tiles (or normalised float ones) to the last layer's rows, normalised."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config: EvaConfig = config
        self.embeddings = EvaEmbeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(EvaLayer(config) for _ in range(config.num_layers))})
        self.post_layernorm: nn.Module = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.recompute: Recompute = "none"

    def forward(self, tiles: Tensor, count: Tensor | None = None) -> Tensor:
        tiles, mean, std = prepare_tiles(self.config, tiles, self.embeddings.position_embedding)
        x_TNC = self.embeddings(tiles, mean, std, count)
        for layer in cast(nn.ModuleList, self.encoder["layers"]):
            x_TNC = run_layer(self.recompute, layer, x_TNC)
        return fused.add_norm(x_TNC, None, self.post_layernorm)[1]

    def unused(self) -> list[nn.Module]:
        return []
