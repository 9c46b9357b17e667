"""SliME's connector: two experts mixed by a gate for an image's overview, and fewer rows for its tiles.

Shapes: T tiles, N rows each, C channels, E the decoder's width. Both experts end in the same MLP: expert 1 is the MLP
alone, expert 2 the MLP after a resampler with a query for each row of the overview. A tile's rows go through another
resampler, then the MLP.

Sources: Zhang et al. 2024 (SliME); yfzhang114/SliME 5c89ec9 multimodal_projector/builder.py, multimodal_resampler/
{builder,sampler}.py. Its noise in training has the deviation softplus(x @ gate) + 0.01; `noise`, which Shazeer et al.
2017 multiply there, is stored and never read.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models.connectors.base import Connector, ConnectorConfig
from llava_fast.models.connectors.mlp import ProjectorConfig
from llava_fast.models.connectors.perceiver import PerceiverConfig

EXPERT_SIDE = 24
"""Side of the overview's rows and of expert 2's queries; for an overview of another side there is only the MLP."""


@dataclass(frozen=True)
class OverviewMixtureConfig(ConnectorConfig):
    """`grid` x `grid` queries for a tile of `side` x `side` rows.

    overview, tiled  False: images have no overview, or nothing else.
    expert  0 or 1: only this expert runs, without the gate.
    """

    rowwise = False
    reads_images = True

    in_features: int
    out_features: int
    num_heads: int
    grid: int
    side: int
    overview: bool = True
    tiled: bool = True
    expert: Literal[0, 1] | None = None

    def __post_init__(self) -> None:
        if not (self.overview or self.tiled):
            raise ValueError("an image without overview and without tiles has no rows")
        self.resampler(self.grid)  # checks sizes

    def resampler(self, grid: int) -> PerceiverConfig:
        width = self.in_features
        positions = {"half_positions": True, "own_positions": True, "trains_positions": False}
        return PerceiverConfig(width, width, self.num_heads, grid, self.side, project=False, **positions)

    @cached_property
    def mlp(self) -> ProjectorConfig:
        return ProjectorConfig("mlp", self.in_features, self.out_features)

    @property
    def runs(self) -> tuple[bool, bool, bool]:
        """Whether expert 1 runs for an overview, expert 2, and the gate."""
        if not self.overview:
            return False, False, False
        if self.side != EXPERT_SIDE:
            return True, False, False
        return self.expert != 1, self.expert != 0, self.expert is None

    def rows_of(self, rows: int) -> int:
        """Of a tile that is not an overview, unless there are only overviews."""
        return self.resampler(self.grid).rows_of(rows) if self.tiled else rows

    @property
    def matrix_size(self) -> int:
        """For a row of a tile, as `rows_of`."""
        if self.tiled:
            return self.resampler(self.grid).matrix_size + self.mlp.matrix_size
        first, second, _ = self.runs
        return (first + second) * self.mlp.matrix_size + second * self.resampler(EXPERT_SIDE).matrix_size

    @property
    def first_matrix_size(self) -> int:
        return 0 if self.tiled else self.runs[0] * self.mlp.first_matrix_size

    def kept_per_row(self, trained: bool) -> int:
        if self.tiled:
            return self.resampler(self.grid).kept_per_row(trained) + self.mlp.kept_per_row(trained)
        first, second, _ = self.runs
        resampled = self.resampler(EXPERT_SIDE).kept_per_row(trained)
        return (first + second) * self.mlp.kept_per_row(trained) + second * resampled

    def build(self) -> OverviewMixture:
        return OverviewMixture(self)


class OverviewMixture(Connector):
    """[T, N, C] -> [rows, E]: of each image its overview's N rows, then `grid` x `grid` rows of each further tile."""

    def __init__(self, config: OverviewMixtureConfig) -> None:
        super().__init__()
        self.config: OverviewMixtureConfig = config
        self.mlp = config.mlp.build()
        self.expert = config.resampler(EXPERT_SIDE).build()
        self.compressor = config.resampler(config.grid).build()
        self.gate = nn.Parameter(torch.zeros(config.in_features, 2))
        self.noise = nn.Parameter(torch.zeros(config.in_features, 2), requires_grad=False)
        self.mean = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.std = nn.Parameter(torch.ones(1), requires_grad=False)

    def unused(self) -> list[nn.Parameter]:
        config, (_, second, gated) = self.config, self.config.runs
        found = [self.noise, self.mean, self.std, *self.expert.unused(), *self.compressor.unused()]
        found += [] if second else self.expert.parameters()
        found += [] if gated else [self.gate]
        return found if config.tiled else [*found, *self.compressor.parameters()]

    def forward(self, features_TNC: Tensor, images: tuple[int, ...]) -> Tensor:
        """`images`: the number of tiles of each image, the first of which is its overview."""
        config = self.config
        starts = list(itertools.accumulate(images, initial=0))[:-1] if config.overview else []
        is_first = torch.zeros(len(features_TNC), dtype=torch.bool)
        is_first[starts] = True
        given: list[Tensor] = []
        if config.overview:
            overview_INC = features_TNC[_indices(is_first, features_TNC)]
            first, second, gated = config.runs
            given += [overview_INC] * first + ([self.expert(overview_INC)] if second else [])
        if config.tiled:
            given.append(self.compressor(features_TNC[_indices(~is_first, features_TNC)]))
        rows = self.mlp(torch.cat([each.flatten(0, 1) for each in given]))
        made = rows.split([each.shape[0] * each.shape[1] for each in given])
        if not config.overview:
            return made[0]
        overview = made[0]
        if gated:
            weights = self._weights(overview_INC.flatten(0, 1))
            overview = made[0] * weights[:, :1] + made[1] * weights[:, 1:]
        if not config.tiled:
            return overview
        if not images:  # tiles of no image, which sharded training runs
            return torch.cat([overview, made[-1]])
        local = made[-1].split([(tiles - 1) * config.grid**2 for tiles in images])
        whole = zip(overview.split(config.side**2), local, strict=True)
        return torch.cat([part for image in whole for part in image])

    def _weights(self, rows_RC: Tensor) -> Tensor:
        """The experts' weights [R, 2]. They add up to 1 / (1 + 1e-6), as the original's."""
        logits = rows_RC @ self.gate
        if self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(logits) + 0.01)
        return logits.softmax(-1) / (1 + 1e-6)


def _indices(chosen: Tensor, like: Tensor) -> Tensor:
    return chosen.nonzero()[:, 0].to(like.device)
