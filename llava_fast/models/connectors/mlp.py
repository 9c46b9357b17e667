"""LLaVA's projectors: Linears with activations between. Sources: Liu et al. 2023 (LLaVA-1.5); Yi-VL's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from llava_fast.models.connectors.base import Connector, ConnectorConfig, PlainLinears
from llava_fast.models.fused import is_plain
from llava_fast.ops.activations import ACTIVATIONS

KINDS = ("linear", "mlp", "identity", "yi")


@dataclass(frozen=True)
class ProjectorConfig(ConnectorConfig):
    """`kind` "linear", "identity", "mlp" (`depth` Linears with an activation between them) or "yi" (an mlp with a
    LayerNorm after each Linear). Raises ValueError for another kind or an unknown activation."""

    hf_names: ClassVar = {"layers.0": "linear_1", "layers.2": "linear_2"}

    kind: str
    in_features: int
    out_features: int
    depth: int = 2
    activation: str = "gelu"
    bias: bool = True

    def __post_init__(self) -> None:
        for field, supported in (("kind", KINDS), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, field) not in supported:
                raise ValueError(f"{field} is {getattr(self, field)!r}; supported are {', '.join(supported)}")

    @property
    def matrix_size(self) -> int:
        if self.kind == "identity":
            return 0
        return self.out_features * (self.in_features + (self._linears - 1) * self.out_features)

    @property
    def first_matrix_size(self) -> int:
        return 0 if self.kind == "identity" else self.in_features * self.out_features

    def kept_per_row(self, trained: bool) -> int:
        """The inputs of activations and LayerNorms and, if weights are trained, of the Linears."""
        if self.kind == "identity":
            return 0
        norms = self.depth if self.kind == "yi" else 0
        hidden = (self._linears - 1) * (1 + trained) + norms
        return trained * self.in_features + hidden * self.out_features

    @property
    def _linears(self) -> int:
        return 1 if self.kind == "linear" else self.depth

    def build(self) -> Projector:
        return Projector(self)


class Activation(nn.Module):
    """A parameter-free step, holding its place in the numbering of the original nn.Sequential."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Projector(Connector):
    """[rows, in_features] -> [rows, out_features]. `layers` is numbered as the original LLaVA's projector."""

    config: ProjectorConfig

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.config = config
        steps: list[nn.Module] = []
        if config.kind != "identity":
            width = config.in_features
            for number in range(1 if config.kind == "linear" else config.depth):
                if number:
                    steps.append(Activation(config.activation))
                steps.append(nn.Linear(width, config.out_features, bias=config.bias))
                if config.kind == "yi":
                    steps.append(nn.LayerNorm(config.out_features))
                width = config.out_features
        self.layers = nn.Sequential(*steps)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)

    def plain_linears(self) -> PlainLinears | None:
        if self.config.kind not in ("linear", "mlp") or not is_plain(self, Projector):
            return None
        if not is_plain(self.layers, nn.Sequential):
            return None
        steps, activations = list(self.layers)[::2], list(self.layers)[1::2]
        linears = [step for step in steps if is_plain(step, nn.Linear)]
        if len(linears) < len(steps) or not all(is_plain(step, Activation) for step in activations):
            return None
        return PlainLinears.of(linears, self.config.activation)
