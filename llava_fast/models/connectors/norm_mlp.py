"""A LayerNorm and an MLP over a tower's concatenated hidden states. ViP-LLaVA's connector.

Sources: Cai et al. 2024 (ViP-LLaVA); transformers 5.24 modeling_vipllava.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from llava_fast.models import fused
from llava_fast.models.connectors.base import Connector, ConnectorConfig, check_activation


@dataclass(frozen=True)
class NormMlpConfig(ConnectorConfig):
    """A LayerNorm, two Linears with an activation between. Raises ValueError for an unknown activation."""

    hf_names: ClassVar[Mapping[str, str]] = {"layer_norm": "projector_layernorm"}

    in_features: int
    out_features: int
    activation: str = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_activation(self.activation)

    @property
    def matrix_size(self) -> int:
        return self.first_matrix_size + self.out_features**2

    @property
    def first_matrix_size(self) -> int:
        return self.in_features * self.out_features

    def kept_per_row(self, trained: bool) -> int:
        return (1 + trained) * (self.in_features + self.out_features)

    def build(self) -> NormMlp:
        return NormMlp(self)


class NormMlp(Connector):
    """[rows, in_features] -> [rows, out_features]."""

    def __init__(self, config: NormMlpConfig) -> None:
        super().__init__()
        self.config: NormMlpConfig = config
        self.layer_norm = nn.LayerNorm(config.in_features, eps=config.layer_norm_eps)
        self.linear_1 = nn.Linear(config.in_features, config.out_features)
        self.linear_2 = nn.Linear(config.out_features, config.out_features)

    def forward(self, features: Tensor) -> Tensor:
        _, normed = fused.add_norm(features, None, self.layer_norm)
        return self.linear_2(fused.activated(normed, self.linear_1, self.config.activation))
