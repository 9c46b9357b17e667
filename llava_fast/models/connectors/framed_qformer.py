"""A Q-Former whose rows stand between two learned vectors. The connector of InternLM-XComposer.

Source: internlm/internlm-xcomposer-7b modeling_InternLM_XComposer.py (`encode_img`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava_fast.models.connectors.qformer import QFormer, QFormerConfig


@dataclass(frozen=True)
class FramedQFormerConfig(QFormerConfig):
    """A Q-Former's config; two more rows per tile."""

    def rows_of(self, rows: int) -> int:
        return super().rows_of(rows) + 2

    def build(self) -> FramedQFormer:
        return FramedQFormer(self)


class FramedQFormer(QFormer):
    """[T, N, in_features] -> [T, 1 + M + 1, out_features]. The vectors start as zeros; the original never trains
    them."""

    def __init__(self, config: FramedQFormerConfig) -> None:
        super().__init__(config)
        self.start, self.end = (nn.Parameter(torch.zeros(1, 1, config.out_features)) for _ in range(2))

    def forward(self, features_TNC: Tensor, instruction: Tensor | None = None) -> Tensor:
        rows_TMC = super().forward(features_TNC, instruction)
        start, end = (vector.expand(len(rows_TMC), -1, -1) for vector in (self.start, self.end))
        return torch.cat([start, rows_TMC, end], dim=1)
