"""SigLIP 2 NaFlex: a ViT over images of any size and aspect ratio, with positions interpolated to each one's grid.

Shapes: R rows, one a patch, of all images end to end; C width; G side of the grid that positions were learned on. A
tile is one patch, so T tiles are R rows. Nothing is padded. Parameter names are those of transformers'
Siglip2VisionModel. Sources: Tschannen et al. 2025 (SigLIP 2); transformers 5.24 modeling_siglip2.py.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from llava_fast.models import fused
from llava_fast.models.towers.vit import Embeddings, VisionTower, VitConfig, grouped, normalised, prepare_tiles
from llava_fast.ops import patch_embed
from llava_fast.storage.bounds import Layers, Pixels, Positive, Size
from llava_fast.storage.files import Fields

Grid = tuple[int, int]


class Siglip2Fields(Fields):
    """Its section of config.json."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_patches: Size
    patch_size: Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)]
    hidden_act: str
    layer_norm_eps: Positive
    num_channels: Annotated[int, Field(ge=3, le=3)] = 3


@dataclass(frozen=True, kw_only=True)
class Siglip2Config(VitConfig):
    """SigLIP 2 for native sizes. `num_patches`: learned positions, of a square grid."""

    kind = "siglip2"
    native_sizes = True
    hf_unused = ("head.",)
    hf_fields = Siglip2Fields

    num_patches: int

    def build(self) -> Siglip2Tower:
        return Siglip2Tower(self)

    def attention_flops(self, tiles: int) -> float:
        """For images with as many patches as there are positions."""
        return 4.0 * tiles * self.num_patches * self.hidden_size * self.layers_needed

    @classmethod
    def tile_side(cls, hf: Any) -> int:
        return hf.patch_size if isinstance(hf.patch_size, int) else hf.patch_size[0]

    @classmethod
    def from_hf(cls, hf: Any, **choices: Any) -> Siglip2Config:
        patch = cls.tile_side(hf)
        if hf.patch_size not in (patch, [patch, patch], (patch, patch)):
            raise ValueError(f"vision_config.patch_size is {list(hf.patch_size)}; only squares are supported")
        if math.isqrt(hf.num_patches) ** 2 != hf.num_patches:
            raise ValueError(f"vision_config.num_patches is {hf.num_patches}; positions need a square grid: 256, say")
        sides = {"image_size": patch, "patch_size": patch}
        return super().from_hf(SimpleNamespace(**(hf.to_dict() | sides)), num_patches=hf.num_patches, **choices)

    def to_hf(self) -> dict[str, Any]:
        own = {"vision_use_head": False, "num_patches": self.num_patches}
        return own | {name: value for name, value in super().to_hf().items() if name != "image_size"}


class Siglip2Embeddings(Embeddings):
    """Rows [1, R, C] of patches [R, 3, P, P] and the grids of their images."""

    def __init__(self, config: Siglip2Config) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, tiles: Tensor, mean: Tensor, std: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        linear, table = self.patch_embedding, self.position_embedding.weight
        if fused.is_plain(linear, nn.Linear):
            weight = rearrange(linear.weight, "o (y x c) -> o c y x", y=self.patch, c=3).contiguous()
            none = table.new_zeros(1, len(weight))
            rows = patch_embed(tiles, weight, none, mean=mean, std=std, bias=linear.bias).flatten(0, 1)
        else:
            rows = linear(normalised(tiles, mean, std, table.dtype).permute(0, 2, 3, 1).flatten(1))
        return (rows + positions(table, grids))[None]


class Siglip2Tower(VisionTower):
    """uint8 patches (or normalised float ones) of images end to end to the selected features.

    All layers are kept, so that saving is complete; only `config.layers_needed` of them run.
    """

    config: Siglip2Config

    def build_embeddings(self) -> Siglip2Embeddings:
        return Siglip2Embeddings(self.config)

    def forward(self, tiles: Tensor, count: Tensor | None = None, grids: tuple[Grid, ...] = ()) -> Tensor:
        """[R, 3, P, P] uint8 or normalised float -> [1, R, features], in the weights' dtype. `grids`: the (rows,
        columns) of each image's patches. Raises ValueError if grids and patches differ in number, and for a `count`,
        because CUDA graphs do not support images of native sizes."""
        if count is not None:
            raise ValueError("patches of images of native sizes cannot be padded to a bucket")
        lengths = [rows * columns for rows, columns in grids]
        if sum(lengths) != len(tiles):
            raise ValueError(f"{len(tiles)} patches, but the images' grids have {sum(lengths)}")
        tiles, mean, std = prepare_tiles(self.config, tiles, self.embeddings.position_embedding.weight)
        return self.run_layers(self.embeddings(tiles, mean, std, grids), grouped(lengths))


def positions(table: Tensor, grids: tuple[Grid, ...]) -> Tensor:
    """[R, C]: a square table of positions [G * G, C] resized to each image's grid, bilinearly and antialiased, in
    float32. Two small products for each size, so that gradients are summed in a fixed order."""
    wide = torch.promote_types(table.dtype, torch.float32)
    side = math.isqrt(len(table))
    table_GGC = table.to(wide).unflatten(0, (side, side))
    made = {}
    for rows, columns in dict.fromkeys(grids):
        down, across = (_resampling(side, size, table.device, wide) for size in (rows, columns))
        made[rows, columns] = torch.einsum("hs,wt,stc->hwc", down, across, table_GGC).flatten(0, 1)
    return torch.cat([table_GGC.flatten(0, 1)[:0], *(made[grid] for grid in grids)]).to(table.dtype)


@functools.lru_cache(maxsize=4096)
def _resampling(side: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[size, side]: interpolation weights from `side` learned positions along an axis to `size`, copied to a device
    once: torch's interpolate with mode="bilinear", antialias=True, align_corners=False.
    """
    scale = side / size
    centre = (np.arange(size) + 0.5) * scale - 0.5
    weights = np.maximum(1 - np.abs(np.arange(side) - centre[:, None]) / max(scale, 1.0), 0)
    with torch.inference_mode(False):  # so that training can save them for backward
        return torch.tensor(weights / weights.sum(1, keepdims=True), dtype=dtype, device=device)
