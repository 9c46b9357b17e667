"""A context row, made by the question, before an image's content rows. The connector of LLaMA-VID.

A Q-Former with InstructBLIP's shape reads the question and a tile, and its queries, projected to the tower's width,
attend to the tile's patches: the mean of what they find is the context row. The content rows are the patches, or their
means over a grid or over the whole tile, through an MLP.

Shapes: T tiles, N rows per tile with the class row first, P patches, Q queries, C the tower's width, M rows per tile,
L tokens of the question. Sources: Li et al. 2023 (LLaMA-VID); dvlab-research/LLaMA-VID b3d3ae2 llamavid_arch.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models.connectors.base import TILES_AT_ONCE, Connector, ConnectorConfig
from llava_fast.models.connectors.mlp import ProjectorConfig
from llava_fast.models.connectors.qformer import QFormerConfig
from llava_fast.models.fused import is_plain


@dataclass(frozen=True)
class ContextContentConfig(ConnectorConfig):
    """`qformer` reads all rows of a tile and gives rows of the tower's width; `content` is the MLP. `grid`: content
    rows are the means of blocks of side // grid patches; 1: of all patches; None: the patches themselves. `side`:
    patches along a tile. Raises ValueError for parts that do not fit."""

    rowwise = False

    qformer: QFormerConfig
    content: ProjectorConfig
    side: int
    grid: int | None = None

    def __post_init__(self) -> None:
        if not self.qformer.reads_text or self.qformer.out_features != self.content.in_features:
            raise ValueError("a context row needs a Q-Former that reads text and gives rows of the tower's width")
        if self.qformer.rows != self.side**2 + 1:
            raise ValueError(
                f"the Q-Former reads {self.qformer.rows} rows; a tile has {self.side}^2 patches and 1 more"
            )
        if self.grid is not None and not 1 <= self.grid <= self.side:
            raise ValueError(f"{self.side} by {self.side} patches have no grid of {self.grid} by {self.grid} means")

    @property
    def in_features(self) -> int:
        return self.content.in_features

    @property
    def out_features(self) -> int:
        return self.content.out_features

    @property
    def reads_text(self) -> bool:
        return True

    @property
    def text_limits(self) -> tuple[int, int]:
        return self.qformer.text_limits

    @property
    def content_rows(self) -> int:
        """Means of blocks of side // grid patches; more than grid^2 if that leaves a remainder, as in the original."""
        return self.side**2 if self.grid is None else (self.side // (self.side // self.grid)) ** 2

    def rows_of(self, rows: int) -> int:
        self.qformer.rows_of(rows)
        return 1 + self.content_rows

    @property
    def matrix_size(self) -> int:
        return round((self._of_context + self.content.matrix_size * self.content_rows) / (1 + self.content_rows))

    @property
    def _of_context(self) -> int:
        """Products with weights for one tile: the Q-Former's, the keys' and the value's."""
        width, queries = self.in_features, self.qformer.queries
        return queries * (self.qformer.matrix_size + width**2) + width * self.out_features

    @property
    def first_matrix_size(self) -> int:
        first = self.qformer.queries * self.qformer.first_matrix_size
        return round((first + self.content.first_matrix_size * self.content_rows) / (1 + self.content_rows))

    def kept_per_row(self, trained: bool) -> int:
        queries, patches, width = self.qformer.queries, self.side**2, self.in_features
        context = queries * (self.qformer.kept_per_row(trained) + 2 * width + patches) + width
        content = self.content_rows * self.content.kept_per_row(trained)
        return round((context + content) / (1 + self.content_rows))

    def build(self) -> ContextContent:
        return ContextContent(self)


class ContextContent(Connector):
    """[T, N, C] and the question's ids [T, L] -> [T, 1 + content rows, out_features]."""

    def __init__(self, config: ContextContentConfig) -> None:
        super().__init__()
        self.config: ContextContentConfig = config
        width = config.in_features
        self.norm = nn.LayerNorm(width)
        self.qformer = config.qformer.build()
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, config.out_features)
        self.content = config.content.build()

    def forward(self, features_TNC: Tensor, instruction: Tensor | None = None) -> Tensor:
        """Raises ValueError without `instruction`."""
        if instruction is None:
            raise ValueError(
                "this connector reads the question with each image, and none is given: make the plan with the "
                "processor of llava_fast.load"
            )
        if not len(features_TNC):
            return self._rows(features_TNC, instruction)
        blocks = zip(features_TNC.split(TILES_AT_ONCE), instruction.split(TILES_AT_ONCE), strict=True)
        made = [self._rows(features, ids) for features, ids in blocks]
        return torch.cat(made) if len(made) > 1 else made[0]

    def _rows(self, features_TNC: Tensor, instruction: Tensor) -> Tensor:
        patches_TPC = features_TNC[:, 1:]
        asks_TQC = self.qformer(self.norm(features_TNC), instruction)
        found_TC = self._found(asks_TQC, patches_TPC)
        return torch.cat([self.value(found_TC)[:, None], self.content(self._means(patches_TPC))], dim=1)

    def _found(self, asks_TQC: Tensor, patches_TPC: Tensor) -> Tensor:
        """The mean of what the queries attend to [T, C]. The keys' matrix multiplies the queries, which are fewer; its
        bias adds the same to all of a query's scores."""
        if is_plain(self.key, nn.Linear):
            scores_TQP = (asks_TQC @ self.key.weight) @ patches_TPC.transpose(1, 2)
            scores_TQP = scores_TQP + (asks_TQC @ self.key.bias)[..., None]
        else:
            scores_TQP = asks_TQC @ self.key(patches_TPC).transpose(1, 2)
        weights_TP = (scores_TQP * self.config.in_features**-0.5).softmax(-1).mean(1)
        return (weights_TP[:, None] @ patches_TPC)[:, 0]

    def _means(self, patches_TPC: Tensor) -> Tensor:
        side, grid = self.config.side, self.config.grid
        if grid is None:
            return patches_TPC
        if grid == 1:
            return patches_TPC.mean(1, keepdim=True)
        planes = patches_TPC.transpose(1, 2).unflatten(2, (side, side))
        return F.avg_pool2d(planes, side // grid).flatten(2).transpose(1, 2)
