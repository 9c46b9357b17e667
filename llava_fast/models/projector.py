"""The projector: from ViT features to the decoder's width. Source: Liu et al. 2023 (LLaVA-1.5); Yi-VL's report."""

from __future__ import annotations

from torch import Tensor, nn

from llava_fast.models.config import ProjectorConfig
from llava_fast.models.fused import is_plain
from llava_fast.ops.activations import ACTIVATIONS


class Activation(nn.Module):
    """A parameter-free step, holding its place in the numbering of the original nn.Sequential."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Projector(nn.Module):
    """[rows, in_features] -> [rows, out_features]. `layers` is numbered as the original LLaVA's projector."""

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

    def plain_weights(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """(weights, biases; an empty list if it has none) if this is plain Linears with activations between, so that
        an op may take them; None if it is another kind or anything is wrapped, hooked, sharded or quantised."""
        if self.config.kind not in ("linear", "mlp") or not is_plain(self, Projector):
            return None
        linears, activations = list(self.layers)[::2], list(self.layers)[1::2]
        plain = is_plain(self.layers, nn.Sequential) and all(is_plain(step, nn.Linear) for step in linears)
        if not plain or not all(is_plain(step, Activation) for step in activations):
            return None
        weights = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        return (weights, biases) if len(biases) in (0, len(linears)) else None
