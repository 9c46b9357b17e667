"""InternViT, InternVL's vision tower: a class row, learned positions, and a scale for each layer's two results.

Shapes: T tiles, N rows per tile (the class row, then patches), C width. Parameter names are those of transformers'
InternVLVisionModel. Sources: Chen et al. 2023 (InternVL); Touvron et al. 2021 (layer scale);
transformers 5.23 modeling_internvl.py.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models import fused
from llava_fast.models.recompute import Recompute, run_layer
from llava_fast.models.towers.base import Tower
from llava_fast.models.towers.vit import VisionMLP, VitConfig, embed_patches, prepare_tiles
from llava_fast.storage.bounds import Layers, Pixels, Positive, Size
from llava_fast.storage.files import Fields

_HEAD_NORM_EPS = 1e-6  # that of queries and keys is not in the config


_Sides = Pixels | Annotated[list[Pixels] | tuple[Pixels, ...], Field(min_length=2, max_length=2)]


class InternVitFields(Fields):
    """An InternVL vision config."""

    model_type: str | None = None
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    image_size: _Sides
    patch_size: _Sides
    hidden_act: str
    layer_norm_eps: Positive
    norm_type: str
    attention_bias: bool
    use_qk_norm: bool
    use_mean_pooling: bool
    use_mask_token: bool
    use_absolute_position_embeddings: bool
    num_channels: Annotated[int, Field(ge=3, le=3)] = 3


@dataclass(frozen=True, kw_only=True)
class InternVitConfig(VitConfig):
    """InternViT. `norm` is "layer_norm" (300M) or "rms_norm" (6B), which also normalises queries and keys (`qk_norm`).
    `final_norm`: a LayerNorm after the last layer, applied to its hidden state when that is the feature."""

    kind = "internvit"
    leading_rows = 1
    hf_fields = InternVitFields
    own_normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    norm: str = "layer_norm"
    qkv_bias: bool = False
    qk_norm: bool = False
    final_norm: bool = False

    @property
    def kept_per_row(self) -> int:
        return super().kept_per_row + (2 + 2 * self.qk_norm) * self.hidden_size

    def build(self) -> InternVitTower:
        return InternVitTower(self)

    def build_norm(self) -> nn.Module:
        kind = {"layer_norm": nn.LayerNorm, "rms_norm": fused.RMSNorm}[self.norm]
        return kind(self.hidden_size, eps=self.layer_norm_eps)

    @classmethod
    def from_hf(cls, hf: Any, **choices: Any) -> InternVitConfig:
        sides = {}
        for field in ("image_size", "patch_size"):
            given = getattr(hf, field)
            sides[field], other = given if isinstance(given, (list, tuple)) else (given, given)
            if sides[field] != other:
                raise ValueError(f"vision_config.{field} is {list(given)}; only squares are supported")
        if hf.norm_type not in ("layer_norm", "rms_norm"):
            raise ValueError(f"vision_config.norm_type is {hf.norm_type!r}; supported are layer_norm, rms_norm")
        for field, supported in (("use_absolute_position_embeddings", True), ("use_mask_token", False)):
            if getattr(hf, field) is not supported:
                raise ValueError(f"vision_config.{field} is {getattr(hf, field)}; only {supported} is supported")
        own = {"norm": hf.norm_type, "qkv_bias": hf.attention_bias, "qk_norm": hf.use_qk_norm}
        own["final_norm"] = not hf.use_mean_pooling
        return super().from_hf(SimpleNamespace(**{**hf.to_dict(), **sides}), **own, **choices)

    def to_hf(self) -> dict[str, Any]:
        square = {"image_size": [self.image_size] * 2, "patch_size": [self.patch_size] * 2}
        own = {"norm_type": self.norm, "attention_bias": self.qkv_bias, "use_qk_norm": self.qk_norm}
        return super().to_hf() | square | own | {"use_mean_pooling": not self.final_norm}


class InternVitEmbeddings(nn.Module):
    def __init__(self, config: InternVitConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embeddings = nn.Sequential(OrderedDict(projection=nn.Conv2d(3, width, patch, patch)))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.rows_per_tile, width))

    def forward(self, tiles: Tensor, mean: Tensor, std: Tensor, count: Tensor | None = None) -> Tensor:
        conv = self.patch_embeddings[0]
        return embed_patches(conv, tiles, self.position_embeddings[0], self.cls_token[0, 0], mean, std, count)


class InternVitAttention(fused.MergesLinears):
    merges: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: InternVitConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=config.qkv_bias) for _ in range(3))
        self.projection_layer = nn.Linear(width, width)
        self.q_norm, self.k_norm = (
            fused.RMSNorm(width, _HEAD_NORM_EPS) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x_TNC: Tensor) -> Tensor:
        query, key, value = self.project(x_TNC, "qkv_proj")
        rows = (self.q_norm(query), self.k_norm(key), value)
        heads = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in rows)
        out_THND = F.scaled_dot_product_attention(*heads)
        return self.projection_layer(out_THND.transpose(1, 2).flatten(2))


class InternVitLayer(nn.Module):
    def __init__(self, config: InternVitConfig) -> None:
        super().__init__()
        self.lambda_1 = nn.Parameter(torch.full((config.hidden_size,), 0.1))
        self.lambda_2 = nn.Parameter(torch.full((config.hidden_size,), 0.1))
        self.attention = InternVitAttention(config)
        self.layernorm_before = config.build_norm()
        self.mlp = VisionMLP(config)
        self.layernorm_after = config.build_norm()

    def forward(self, x_TNC: Tensor) -> Tensor:
        x_TNC, normed_TNC = fused.add_norm(x_TNC, None, self.layernorm_before)
        change_TNC = self.lambda_1 * self.attention(normed_TNC)
        x_TNC, normed_TNC = fused.add_norm(x_TNC, change_TNC, self.layernorm_after)
        return x_TNC + self.lambda_2 * self.mlp(normed_TNC)


class InternVitTower(Tower):
    """uint8 tiles (or normalised float ones) to the selected features.

    All layers are kept, so that saving is complete; only `config.layers_needed` of them run.
    """

    def __init__(self, config: InternVitConfig) -> None:
        super().__init__()
        self.config: InternVitConfig = config
        self.embeddings = InternVitEmbeddings(config)
        layers = nn.ModuleList(InternVitLayer(config) for _ in range(config.num_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        if config.final_norm:
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.recompute: Recompute = "none"

    def forward(self, tiles: Tensor, count: Tensor | None = None) -> Tensor:
        config = self.config
        tiles, mean, std = prepare_tiles(config, tiles, self.embeddings.position_embeddings)
        x_TNC = self.embeddings(tiles, mean, std, count)
        wanted = [layer if layer >= 0 else config.num_layers + 1 + layer for layer in config.feature_layers]
        states = {0: x_TNC}
        for depth, layer in enumerate(self._layers()[: config.layers_needed], 1):
            states = {key: state for key, state in states.items() if key in wanted}
            states[depth] = x_TNC = run_layer(self.recompute, layer, x_TNC)
        if config.final_norm and config.feature_layers == (-1,):  # as transformers: of -1 alone, not of several
            return self.layernorm(x_TNC)
        return torch.cat([states[depth] for depth in wanted], dim=-1) if len(wanted) > 1 else states[wanted[0]]

    def _layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.encoder["layer"])

    def unused(self) -> list[nn.Module]:
        config = self.config
        norm = [self.layernorm] if config.final_norm and config.feature_layers != (-1,) else []
        return [*self._layers()[config.layers_needed :], *norm]
