"""What a decoder is to the rest: its config says its sizes and costs, and builds its layers for the stack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from llava_fast.models.blocks.attention import Spans
from llava_fast.models.blocks.rope import RopeConfig
from llava_fast.models.paged_cache import PagedCache

Split = Literal["columns", "rows", "shared"]


@dataclass(frozen=True)
class RowContext:
    """What a layer is told of its rows besides their values.

    rotation  (cos, sin) of each row's position, [R, 1, D] each, the sign of sin's first half folded in.
    spans     how rows group into sequences.
    cache     the KV cache, if keys and values are kept.
    modality  int32 [R]: text, image or video (see inputs.plan), for layers with weights by modality; None if not asked.
    memory    rows beside the sequence that layers may attend to [M, C]; None if there are none.
    """

    rotation: tuple[Tensor, Tensor]
    spans: Spans
    cache: PagedCache | None = None
    modality: Tensor | None = None
    memory: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ABC):
    """A decoder-only language model. `sliding_windows` gives each layer's, None for layers that see everything."""

    family: ClassVar[str]
    """The model_type that transformers gives its config."""
    original_type: ClassVar[str | None] = None
    """The model_type of an original LLaVA with this decoder; None: the original has none. It is not inherited."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    sliding_windows: tuple[int | None, ...] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.original_type = vars(cls).get("original_type")

    @property
    def context_length(self) -> int:
        """Positions the decoder is made for: stretched by linear and dynamic RoPE scaling."""
        stretched = self.rope.factor if self.rope.kind in ("linear", "dynamic") else 1.0
        return int(self.max_positions * stretched)

    def window_of(self, layer: int) -> int | None:
        """Keys that a query of this layer attends to, itself included; None: all."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    @abstractmethod
    def build_layer(self, layer: int) -> nn.Module:
        """Layer number `layer`: called as (rows [R, C], RowContext) -> [R, C]."""

    @abstractmethod
    def build_norm(self) -> nn.Module:
        """The norm after the last layer."""

    @property
    @abstractmethod
    def layer_matrix_size(self) -> int:
        """Entries of a layer's matrices; each costs a row a multiplication and an addition."""

    @abstractmethod
    def kept_per_row(self, itemsize: int) -> tuple[int, int]:
        """Bytes that a layer keeps of a row for its backward pass: (everything, its input and its products alone), for
        values of `itemsize` bytes."""

    @property
    @abstractmethod
    def tensor_plan(self) -> dict[str, Split]:
        """How tensor parallel splits a layer's modules: Linears by output features ("columns"), or by input features,
        summed ("rows"). A norm over each head is "shared": every process holds its weights and calls it with its own
        heads [R, heads, D], and their gradients are summed."""

    @classmethod
    @abstractmethod
    def from_hf(cls, hf: Any, tied: bool) -> DecoderConfig:
        """From a transformers config of this family. Raises ValueError for what this decoder cannot be."""

    @abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """The fields of a transformers config, as 4.x names them (rope_theta, rope_scaling), model_type left out."""
