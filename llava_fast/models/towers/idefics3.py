"""The vision tower of Idefics3 and SmolVLM: a SigLIP that looks its positions up by fractions of the image's side.

Here every tile is full, so patch i of n along a side has the fraction i / n. float32 rounds some of these into the
bucket before or after (n = 19, 25, 29 and others; not 26, 27 or 32 of the published models), so transformers'
arithmetic is repeated. Shapes: T tiles, N patches per tile, C width. Parameter names
are those of transformers' Idefics3VisionTransformer. Sources: Dehghani et al. 2023 (NaViT); transformers 5.24
modeling_idefics3.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava_fast.models import fused
from llava_fast.models.towers.vit import Images, VisionEmbeddings, VisionTower, VitConfig, embed_patches


@dataclass(frozen=True, kw_only=True)
class Idefics3VisionConfig(VitConfig):
    """Idefics3's tower. Its feature is the last hidden state after the last LayerNorm."""

    kind = "idefics3"

    def build(self) -> Idefics3Tower:
        return Idefics3Tower(self)


@dataclass(frozen=True, kw_only=True)
class SmolVlmVisionConfig(Idefics3VisionConfig):
    """SmolVLM's, which differs in its name."""

    kind = "smolvlm"


class Idefics3Embeddings(VisionEmbeddings):
    def forward(self, tiles: Tensor, mean: Tensor, std: Tensor, count: Tensor | None = None) -> Tensor:
        table = self.position_embedding.weight
        place = places(round(len(table) ** 0.5), table.device)
        return embed_patches(self.patch_embedding, tiles, table[place], None, mean, std, count)


def places(side: int, device: torch.device) -> Tensor:
    """int64 [side * side]: the row of the position table of each patch of a full tile."""
    borders = torch.arange(1 / side, 1.0, 1 / side, device=device)
    fraction = torch.arange(side, dtype=torch.float32, device=device) * (1.0 / torch.full((), side, device=device))
    bucket = torch.bucketize(fraction.clamp(max=1.0 - 1e-6), borders, right=True)
    return (bucket[:, None] * side + bucket).flatten()


class Idefics3Tower(VisionTower):
    def build_embeddings(self) -> Idefics3Embeddings:
        return Idefics3Embeddings(self.config)

    def run_layers(self, x_TNC: Tensor, images: Images | None = None) -> Tensor:
        return fused.add_norm(super().run_layers(x_TNC, images), None, self.post_layernorm)[1]

    def unused(self) -> list[nn.Module]:
        return []
