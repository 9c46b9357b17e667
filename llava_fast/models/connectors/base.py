"""The interface of connectors: whether they work row by row, how many rows they return, what they cost, how to build
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from llava_fast.ops.activations import ACTIVATIONS

TILES_AT_ONCE = 64
"""Tiles that run at once where that can be chosen, so that a long video needs little more memory than a short one."""


def check_activation(name: str) -> None:
    """Raise ValueError for an unsupported activation."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; supported are {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class ConnectorConfig(ABC):
    """From tower features [.., in_features] to decoder rows [.., out_features]."""

    rowwise: ClassVar[bool] = True
    """True: each output row depends on one row of the tower, so unused rows need not be computed. False: the connector
    maps the rows of all tiles [T, N, in_features], without dropped leading rows, to [T, M, out_features]; a plan counts
    M rows per tile."""
    any_shape: ClassVar[bool] = False
    """For connectors that read whole tiles: whether `forward` takes the (rows, columns) of a tile's rows as `shape`,
    and so supports towers of native sizes."""
    reads_images: ClassVar[bool] = False
    """For connectors that read whole tiles: whether `forward` also gets `images`, the number of tiles of each image,
    and returns the rows of all images end to end, of any number per image ([rows, out_features]); a plan counts
    `VisualRows.table_rows`."""
    hf_names: ClassVar[Mapping[str, str]] = {}
    """Our module name -> transformers' module name."""

    @property
    def reads_text(self) -> bool:
        """Whether `forward` also gets `instruction`, int32 [T, L]: the ids of a text for each tile, padding -1."""
        return False

    @property
    def text_limits(self) -> tuple[int, int]:
        """(most tokens, size of the vocabulary) of the text that it reads."""
        raise NotImplementedError

    def rows_of(self, rows: int) -> int:
        """Output rows for this many rows of a tile. Raises ValueError for an unsupported number."""
        return rows

    @property
    @abstractmethod
    def matrix_size(self) -> int:
        """Entries of its matrices; each costs a row a multiplication and an addition."""

    @property
    @abstractmethod
    def first_matrix_size(self) -> int:
        """Entries of the matrix that reads the tower's features; with a frozen tower it has no input gradient."""

    @property
    def text_matrix_size(self) -> int:
        """Entries of the matrices that a row of `instruction` passes."""
        return 0

    @abstractmethod
    def kept_per_row(self, trained: bool) -> int:
        """Values saved for a row's backward pass, with or without gradients of the weights."""

    @property
    def kept_per_text_row(self) -> int:
        """Values saved for the backward pass of a row of `instruction`."""
        return 0

    @abstractmethod
    def build(self) -> Connector:
        """The connector itself."""


class PlainLinears(NamedTuple):
    """Linears with one activation between (its name in ops.activations): weights [out, in], biases [out], empty if
    there are none.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    activation: str

    @classmethod
    def of(cls, linears: Sequence[nn.Linear], activation: str) -> PlainLinears | None:
        """None if only some have a bias."""
        weights: list[Tensor] = [linear.weight for linear in linears]
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        found = cls(weights, biases, activation)
        return found if len(biases) in (0, len(linears)) else None


class Connector(nn.Module):
    """A built connector."""

    config: ConnectorConfig

    def unused(self) -> list[nn.Parameter]:
        """Parameters that no output depends on, or that stay as they are: training leaves them out."""
        return []

    def plain_linears(self) -> PlainLinears | None:
        """Its Linears if it consists only of Linears with one activation between, so that ops.assemble_inputs may run
        them; None if not, or if anything is wrapped, hooked, sharded or quantised.
        """
        return None
