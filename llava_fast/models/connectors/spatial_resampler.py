"""A resampler in which each query attends to its own region of a slice. LLaVA-UHD's connector.

Shapes: T slices of one size, N rows each (H x W), G x G queries, E their width. A query reads its region of the slice,
H / G by W / G rows, interpolated to a few points (RoIAlign, aligned=False). Parameter names are those of the original
checkpoints, including pos_embed, which their trainer trains with the projector.
Sources: Guo et al. 2024 (LLaVA-UHD); thunlp/LLaVA-UHD 48472b4 uhd_v1_resampler.py; He et al. 2017 (RoIAlign).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llava_fast.models.connectors.perceiver import Perceiver, PerceiverConfig

_PLACES = ((2, 4), (2, 3), (3, 4), (3, 3), (4, 2), (3, 2), (4, 3))
"""Candidates for the (rows, columns) of points that a query reads, in order of preference."""


@dataclass(frozen=True)
class SpatialResamplerConfig(PerceiverConfig):
    """Like a perceiver's config; `side` is the side of the square slices that cost estimates assume."""

    any_shape = True
    own_positions: bool = True

    def rows_of(self, rows: int) -> int:
        return self.queries

    def build(self) -> SpatialResampler:
        return SpatialResampler(self)


class SpatialResampler(Perceiver):
    """[T, N, in_features] -> [T, G * G, out_features]."""

    def forward(self, features_TNC: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """`shape` (rows, columns) of the N rows, if not the config's square."""
        config, shape = self.config, shape or (self.config.side, self.config.side)
        value = self.ln_kv(self.kv_proj(features_TNC))
        of_queries, at = self.positions_of(shape, value)
        query = (self.ln_q(self.query) + of_queries)[None, :, None].expand(len(value), -1, -1, -1)
        key, value = (self._parts(rows, shape) for rows in (value + at, value))
        out = self.attn(query.flatten(0, 1), key, value, need_weights=False)[0]
        out = self.ln_post(out.unflatten(0, (len(features_TNC), config.queries)).flatten(2))
        return out @ self.proj if config.project else out

    def _parts(self, rows_TNE: Tensor, shape: tuple[int, int]) -> Tensor:
        """[T * G * G, places, E]: the keys of each query."""
        places = best_places(shape)
        down, across = (
            sampling(self.config.grid, size, count, rows_TNE.device, rows_TNE.dtype)
            for size, count in zip(shape, places, strict=True)
        )
        square = rows_TNE.unflatten(1, shape)
        return torch.einsum("iph,jqw,thwe->tijpqe", down, across, square).flatten(3, 4).flatten(0, 2)


def best_places(shape: tuple[int, int]) -> tuple[int, int]:
    """The (rows, columns) of points that a query samples in a slice of this shape: the candidate with the nearest
    aspect ratio, the first at a tie.
    """
    ratio = math.log(shape[1] / shape[0])
    return min(_PLACES, key=lambda places: abs(ratio - math.log(places[1] / places[0])))


@functools.lru_cache(maxsize=4096)
def sampling(parts: int, size: int, places: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[parts, places, size]: RoIAlign's weights for an axis of `size` rows, cut into `parts` regions with `places`
    points each. A region is at least one row long; a point is the mean of as many samples as it has rows, rounded
    up."""
    length = size / parts
    each = max(length, 1.0) / places
    samples = math.ceil(each)
    weights = np.zeros((parts, places, size))
    for part in range(parts):
        for place in range(places):
            for sample in range(samples):
                at = part * length + (place + (sample + 0.5) / samples) * each
                if at > size:
                    continue
                low = min(int(at), size - 1)
                share = at - low if low < size - 1 else 0.0
                weights[part, place, low] += (1 - share) / samples
                weights[part, place, min(low + 1, size - 1)] += share / samples
    with torch.inference_mode(False):  # so that training can save them for backward
        return torch.tensor(weights, dtype=dtype, device=device)
