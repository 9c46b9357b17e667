"""CLIP's and SigLIP's vision towers, stopping at the layer whose hidden states are used.

Shapes: T tiles, N rows per tile (patches, and CLIP's class row first), C width, H heads. Parameter names are those of
transformers' CLIPVisionModel and SiglipVisionModel. Sources: Radford et al. 2021 (CLIP), Zhai et al. 2023 (SigLIP).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models import fused
from llava_fast.models.recompute import Recompute, run_layer
from llava_fast.models.towers.base import Tower, TowerConfig
from llava_fast.ops import patch_embed

V = TypeVar("V", bound="VitConfig")


@dataclass(frozen=True, kw_only=True)
class VitConfig(TowerConfig):
    """A vision transformer of equal layers: attention and an MLP of two Linears, LayerNorm before each."""

    hf4_prefix = "vision_model."
    activations: ClassVar[tuple[str, ...]] = ("quick_gelu", "gelu", "gelu_pytorch_tanh")

    intermediate_size: int
    num_heads: int
    activation: str
    layer_norm_eps: float

    @property
    def layer_matrix_size(self) -> int:
        return self.hidden_size * (4 * self.hidden_size + 2 * self.intermediate_size)

    @property
    def kept_per_row(self) -> int:
        return 8 * self.hidden_size + 2 * self.intermediate_size

    def build(self) -> Tower:
        return VisionTower(self)

    @classmethod
    def from_hf(cls: type[V], hf: Any, **choices: Any) -> V:
        if hf.hidden_size % hf.num_attention_heads:
            raise ValueError(
                f"a tower of hidden_size {hf.hidden_size} has no {hf.num_attention_heads} equal num_attention_heads"
            )
        if hf.hidden_act not in cls.activations:
            raise ValueError(
                f"vision_config.hidden_act is {hf.hidden_act!r}; supported are {', '.join(cls.activations)}"
            )
        return cls(
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            image_size=hf.image_size,
            patch_size=hf.patch_size,
            activation=hf.hidden_act,
            layer_norm_eps=hf.layer_norm_eps,
            **choices,
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_channels": 3,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_act": self.activation,
            "layer_norm_eps": self.layer_norm_eps,
        }


@dataclass(frozen=True, kw_only=True)
class ClipConfig(VitConfig):
    """CLIP: a class row, a LayerNorm before the layers, no bias in the patch embedding."""

    kind = "clip"
    leading_rows = 1
    own_aspect = "crop"
    own_normalisation = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True, kw_only=True)
class SiglipConfig(VitConfig):
    """SigLIP, and SigLIP 2 of one image size."""

    kind = "siglip"
    hf_unused = ("head.",)  # the pooling head

    def to_hf(self) -> dict[str, Any]:
        return {"vision_use_head": False, **super().to_hf()}


Images = tuple[tuple[int, int], ...]
"""How concatenated rows group into images, run-length encoded: (rows of an image, number of consecutive images)."""


class Embeddings(nn.Module):
    """The first module of a VisionTower: tiles to rows [T, N, C]."""

    position_embedding: nn.Embedding


class VisionEmbeddings(Embeddings):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        rows = config.rows_per_tile
        if config.has_class_row:
            self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=not config.has_class_row)
        self.position_embedding = nn.Embedding(rows, width)

    def forward(self, tiles: Tensor, mean: Tensor, std: Tensor, count: Tensor | None = None) -> Tensor:
        class_row = getattr(self, "class_embedding", None)
        return embed_patches(self.patch_embedding, tiles, self.position_embedding.weight, class_row, mean, std, count)


def grouped(lengths: Sequence[int]) -> Images:
    """Run-length encode the images' numbers of rows, for run_layers."""
    return tuple((length, len(list(same))) for length, same in itertools.groupby(lengths)) or ((0, 1),)


def normalised(tiles: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 tiles [T, 3, H, W] normalised by mean and std [3], in `dtype`; floating tiles unchanged."""
    if tiles.dtype != torch.uint8:
        return tiles
    return ((tiles / 255.0 - mean[:, None, None]) / std[:, None, None]).to(dtype)


def embed_patches(
    conv: nn.Module,
    tiles: Tensor,
    position: Tensor,
    class_row: Tensor | None,
    mean: Tensor,
    std: Tensor,
    count: Tensor | None = None,
) -> Tensor:
    """Tiles [T, 3, H, W] to rows [T, N, C]: patches by `conv`, after a class row [C] if there is one, and positions
    [N, C]. Bytes are normalised by mean and std [3]; `count` as for a tower. One op where `conv` is plain."""
    if fused.is_plain(conv, nn.Conv2d):
        return patch_embed(
            tiles, conv.weight, position, mean=mean, std=std, bias=conv.bias, class_row=class_row, count=count
        )
    rows = conv(normalised(tiles, mean, std, position.dtype)).flatten(2).transpose(1, 2)
    if class_row is not None:
        rows = torch.cat([class_row.expand(len(rows), 1, -1), rows], dim=1)
    return rows + position


class VisionAttention(fused.MergesLinears):
    merges: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_TNC: Tensor, images: Images | None = None) -> Tensor:
        projected = self.project(x_TNC, "qkv_proj")
        query, key, value = (rows.unflatten(-1, (self.heads, -1)) for rows in projected)
        attend = _attend_tiles if images is None else functools.partial(_attend_images, images)
        return self.out_proj(attend(query, key, value).flatten(2))


def _attend_tiles(query_TNHD: Tensor, key_TNHD: Tensor, value_TNHD: Tensor) -> Tensor:
    """Attention inside each tile: [T, N, H, D]."""
    query, key, value = (rows.transpose(1, 2) for rows in (query_TNHD, key_TNHD, value_TNHD))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _attend_images(images: Images, query_1RHD: Tensor, key_1RHD: Tensor, value_1RHD: Tensor) -> Tensor:
    """Attention within each image of concatenated rows: [1, R, H, D]. Consecutive images of one length share a call."""
    sizes = [length * count for length, count in images]
    split = (rows[0].split(sizes) for rows in (query_1RHD, key_1RHD, value_1RHD))
    made = []
    for (length, count), *group in zip(images, *split, strict=True):
        made.append(_attend_tiles(*(rows.unflatten(0, (count, length)) for rows in group)).flatten(0, 1))
    return torch.cat(made)[None]


class VisionMLP(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(fused.activated(x, self.fc1, self.activation))


class VisionLayer(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_TNC: Tensor, images: Images | None = None) -> Tensor:
        return _sum(*self.run(x_TNC, None, None, images))

    def run(
        self, x_TNC: Tensor, delta_TNC: Tensor | None, before: nn.Module | None = None, images: Images | None = None
    ) -> tuple[Tensor, Tensor]:
        """The layer on x + delta (or on `before`(x), the tower's own first LayerNorm). Returns (x, delta): the MLP's
        output is not added yet; the next layer's fused add + LayerNorm adds it. With `images`, x is [1, R, C], the
        rows of all images end to end, and each attends to its own."""
        if before is not None:
            x_TNC, normed_TNC = fused.norm_norm(x_TNC, before, self.layer_norm1)
        else:
            x_TNC, normed_TNC = fused.add_norm(x_TNC, delta_TNC, self.layer_norm1)
        x_TNC, normed_TNC = fused.add_norm(x_TNC, self.self_attn(normed_TNC, images), self.layer_norm2)
        return x_TNC, self.mlp(normed_TNC)


def _sum(x: Tensor, delta: Tensor | None) -> Tensor:
    return x if delta is None else x + delta


class VisionEncoder(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))


@functools.cache
def on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 values, copied to a device once: a copy at each call would stall the GPU and could not be captured in a
    graph.
    """
    with torch.inference_mode(False):  # so that training can save them for backward
        return torch.tensor(values, dtype=torch.float32, device=device)


def prepare_tiles(config: TowerConfig, tiles: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tiles, mean, std) for a patch embedding with weights like this one: tiles stay bytes if it folds their
    normalisation, else they are normalised; mean and std float32 [3].
    """
    # Dynamo traces what the cache wraps, and warns if it is left to find that out.
    made = on_device.__wrapped__ if torch.compiler.is_compiling() else on_device
    mean, std = (made(values, like.device) for values in config.normalisation)
    if tiles.dtype == torch.uint8 and not config.folds_normalisation:
        tiles = (tiles / 255 - mean[:, None, None]) / std[:, None, None]
    return (tiles.to(like.dtype) if tiles.is_floating_point() else tiles), mean, std


class VisionTower(Tower):
    """uint8 tiles (or normalised float ones) to the selected ViT features.

    All layers are kept, so that saving is complete; only `config.layers_needed` of them run.
    """

    config: VitConfig

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = self.build_embeddings()
        if config.has_class_row:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = VisionEncoder(config)
        self.recompute: Recompute = "none"
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def build_embeddings(self) -> Embeddings:
        return VisionEmbeddings(self.config)

    def forward(self, tiles: Tensor, count: Tensor | None = None) -> Tensor:
        """[T, 3, H, W] uint8 or normalised float -> [T, rows, features], in the weights' dtype. A class row is always
        included, even if the plan does not use it: slicing it off would copy all others. `count` int32 [1]: the number
        of real tiles; features of later tiles are undefined and must not be read.
        """
        tiles, mean, std = prepare_tiles(self.config, tiles, self.embeddings.position_embedding.weight)
        return self.run_layers(self.embeddings(tiles, mean, std, count))

    def run_layers(self, x_TNC: Tensor, images: Images | None = None) -> Tensor:
        """Run the embeddings' rows through the needed layers; returns the selected features. `images` as for a
        layer.
        """
        config = self.config
        before = self.pre_layrnorm if config.has_class_row else None
        delta_TNC = None
        wanted = [layer if layer >= 0 else config.num_layers + 1 + layer for layer in config.feature_layers]
        states = {}
        for depth, layer in enumerate(self.encoder.layers[: config.layers_needed]):
            plain = layer if fused.is_untouched(layer, VisionLayer) else None
            if depth in wanted or plain is None:
                x_TNC = _sum(x_TNC if before is None else before(x_TNC), delta_TNC)
                before = delta_TNC = None
            if depth in wanted:
                states[depth] = x_TNC
            if plain is not None:
                x_TNC, delta_TNC = run_layer(self.recompute, plain.run, x_TNC, delta_TNC, before, images)
                before = None
            else:
                x_TNC = run_layer(self.recompute, layer, x_TNC, *(() if images is None else (images,)))
        states[config.layers_needed] = _sum(x_TNC if before is None else before(x_TNC), delta_TNC)
        return torch.cat([states[depth] for depth in wanted], dim=-1) if len(wanted) > 1 else states[wanted[0]]

    def unused(self) -> list[nn.Module]:
        """Layers after the selected one, and the last LayerNorm."""
        return [*self.encoder.layers[self.config.layers_needed :], self.post_layernorm]
