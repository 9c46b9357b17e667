"""The interface of decoders: a config gives sizes and costs, and builds the layers for the stack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models import fused
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.blocks.native_step import head_runs_natively
from llava_fast.models.blocks.rope import RopeConfig
from llava_fast.models.paged_cache import BLOCK_ROWS, PagedCache, Pages
from llava_fast.models.quantised import Quantised, QuantisedEmbedding, like
from llava_fast.models.recompute import Recompute
from llava_fast.ops.linear import linear
from llava_fast.ops.linear_cross_entropy import linear_cross_entropy
from llava_fast.storage.files import Fields

Split = Literal["columns", "rows", "shared"]
LayerGroup = tuple[torch.device, int]
"""A device and the first of the layers on it."""


@dataclass(frozen=True)
class RowContext:
    """The inputs of a layer besides its rows.

    rotation  (cos, sin) of each row's position, [R, 1, D] each; the first half of sin is negated.
    spans     how rows group into sequences.
    cache     the KV cache, or None.
    pages     block tables on the device for ops.paged_attention, if each row is the next of its sequence; or None.
    modality  int32 [R]: text, image or video (see inputs.plan), for layers with weights by modality; None if not
    needed.
    memory    rows outside the sequence that layers may attend to [M, C], or None.
    query_scale  factor of each row's queries, [R, 1, 1], or None: 1.
    wanted    int [W], ascending, of the last layer: its attention returns these rows alone; None: all.
    """

    rotation: tuple[Tensor, Tensor]
    spans: Spans
    cache: PagedCache | None = None
    pages: Pages | None = None
    modality: Tensor | None = None
    memory: Tensor | None = None
    query_scale: Tensor | None = None
    wanted: Tensor | None = None

    def on(self, device: torch.device, layer: int) -> RowContext:
        """The same on another device, for layers from this one on, in a pass without `pages`."""
        cos, sin = self.rotation
        return replace(
            self,
            rotation=(cos.to(device), sin.to(device)),
            cache=None if self.cache is None else self.cache.part_of(layer),
            modality=None if self.modality is None else self.modality.to(device),
            memory=None if self.memory is None else self.memory.to(device),
            query_scale=None if self.query_scale is None else self.query_scale.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ABC):
    """A language model, in most cases a decoder alone. `sliding_windows` has one entry for each layer, None for full
    attention."""

    family: ClassVar[str]
    """The model_type that transformers gives its config."""
    original_type: ClassVar[str | None] = None
    """The model_type of an original LLaVA with this decoder; None: the original has none. It is not inherited."""
    embedding_name: ClassVar[str] = "embed_tokens"
    layers_name: ClassVar[str] = "layers"
    """Names of the token embedding and the layers in transformers' base model, also used here."""
    hf_fields: ClassVar[type[Fields] | None] = None
    """The schema of its section of config.json; None: that of a Llama."""

    has_learned_positions: ClassVar[bool] = False
    """Whether positions beyond `max_positions` are impossible."""
    tied_by_file: ClassVar[bool] = False
    """Whether the head is tied exactly if a checkpoint stores none, or one equal to the embedding, whatever
    config.json says."""
    overflows_in: ClassVar[tuple[torch.dtype, ...]] = ()
    """The dtypes in which its values overflow."""

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
        """Positions that the decoder supports, including RoPE scaling by a factor."""
        stretched = self.rope.factor if self.rope.kind in ("linear", "dynamic", "by_prompt") else 1.0
        return int(self.max_positions * stretched)

    @property
    def reference_length(self) -> int | None:
        """Rows up to which a row's result depends on its prefix alone, in training and inference alike; None: all."""
        return self.max_positions if self.rope.kind in ("dynamic", "by_prompt") else None

    def window_of(self, layer: int) -> int | None:
        """Keys that a query of this layer attends to, itself included; None: all."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    def pairs(self, layer: int, length: int) -> int:
        """How many pairs of rows attend to each other in a layer, in a sequence of `length` rows, for estimates."""
        seen = min(length, self.window_of(layer) or length)
        return seen * (seen + 1) // 2 + (length - seen) * seen

    @property
    def answer_start(self) -> int | None:
        """The token with which answers begin in a model that reads its prompt with an encoder and writes the answer
        with a decoder; None: one decoder reads both."""
        return None

    @abstractmethod
    def build(self) -> BaseDecoder:
        """The decoder itself."""

    @property
    @abstractmethod
    def layer_matrix_size(self) -> int:
        """Entries of a layer's matrices; each costs a row a multiplication and an addition."""

    @abstractmethod
    def kept_per_row(self, itemsize: int) -> tuple[int, int]:
        """Bytes that a layer saves for a row's backward pass: (everything, only its input and matrix products), for
        values of `itemsize` bytes.
        """

    @property
    @abstractmethod
    def tensor_plan(self) -> dict[str, Split]:
        """How tensor parallel splits a layer's modules: Linears by output features ("columns"), or by input features,
        summed ("rows"). A per-head norm is "shared": every process holds its weights and calls it with its own heads
        [R, heads, D], and gradients are summed. Empty: not split."""

    @classmethod
    @abstractmethod
    def from_hf(cls, hf: Any, tied: bool) -> DecoderConfig:
        """From a transformers config of this family. Raises ValueError for unsupported settings."""

    @abstractmethod
    def to_hf(self) -> dict[str, Any]:
        """The fields of a transformers config, with the names of 4.x (rope_theta, rope_scaling), without model_type."""

    def to_hf5(self) -> dict[str, Any]:
        """The same for transformers 5, which has `rope_parameters`."""
        return self.to_hf() | {"rope_parameters": {"rope_theta": self.rope.theta, **self.rope.scaling()}}


@dataclass(frozen=True, kw_only=True)
class StackConfig(DecoderConfig):
    """A decoder whose layers are this package's."""

    def build(self) -> BaseDecoder:
        from llava_fast.models.decoders.stack import Decoder  # it knows the layers that one op replaces

        return Decoder(self)

    def query_scale(self, position_R: Tensor, reach: int | None = None) -> Tensor | None:
        """RowContext.query_scale of rows at these positions, all below `reach` if that is known. Not in training."""
        return None

    @abstractmethod
    def build_layer(self, layer: int) -> nn.Module:
        """Layer number `layer`: called as (rows [R, C], RowContext) -> [R, C]."""

    @abstractmethod
    def build_norm(self) -> nn.Module:
        """The norm after the last layer."""


class BaseDecoder(nn.Module, ABC):
    """A built decoder: rows in, hidden states out; `logits` applies the (tied or own) head to the given rows.

    embed_tokens, layers, lm_head (unless it is tied)  the names by which other code finds them, whatever the model
    calls them.
    layer_groups  where layers are if not all with the embedding and the head (checkpoints.device_map): rows move at the
                  boundaries, and back after the last. Such a decoder runs its modules, without graphs or decoder_step.
    """

    config: DecoderConfig
    embed_tokens: nn.Embedding | QuantisedEmbedding
    layers: nn.ModuleList
    lm_head: nn.Linear | Quantised
    recompute: Recompute
    cache_codes: str | None = None
    """How `new_cache` stores keys and values (see PagedCache): None, in the decoder's dtype, or "int8"."""
    layer_groups: tuple[LayerGroup, ...] = ()

    @abstractmethod
    def forward(self, x_RC: Tensor, position_R: Tensor, spans: Spans, cache: PagedCache | None = None) -> Tensor:
        """inputs_embeds [R, C] and position ids [R] to final hidden states [R, C]. With a cache, every sequence's table
        gets the blocks that it needs (CacheFullError if there are none); the caller updates the tables' lengths.
        """

    def rows_of(
        self, x_RC: Tensor, position_R: Tensor, spans: Spans, cache: PagedCache | None, wanted: Tensor
    ) -> Tensor:
        """`forward`'s hidden states of these rows alone, int [W], ascending: [W, C]."""
        return self(x_RC, position_R, spans, cache)[wanted]

    def steps_natively(self, x_RC: Tensor, spans: Spans) -> bool:
        """Whether `forward` with a cache would run these rows as one decoder_step, whose result for each row does not
        depend on the others, bit for bit.
        """
        return False

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, C] -> [rows, vocabulary]."""
        tied = self.config.tie_embeddings
        head = self.embed_tokens if tied else self.lm_head
        if isinstance(head, QuantisedEmbedding):
            return head.project(hidden)
        if isinstance(head, nn.Embedding):
            run = linear if head_runs_natively(hidden, head.weight) else F.linear
            return run(hidden, head.weight)
        if (
            type(head) is nn.Linear
            and head_runs_natively(hidden, head.weight, head.bias)
            and fused.is_plain(head, nn.Linear)
        ):
            return linear(hidden, head.weight, head.bias)
        return head(hidden)

    @property
    def dtype(self) -> torch.dtype:
        return like(self.embed_tokens).dtype

    @property
    def device(self) -> torch.device:
        return like(self.embed_tokens).device

    def losses(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood of each row's target: [rows, C], int [rows] -> float32 [rows]. If the head is a plain
        layer, the logits are not materialised.
        """
        tied = self.config.tie_embeddings
        head = self.embed_tokens if tied else self.lm_head
        if not isinstance(head, Quantised) and (tied or fused.is_plain(head, nn.Linear)):
            return linear_cross_entropy(hidden, head.weight, target)
        return F.cross_entropy(self.logits(hidden).float(), target.long(), reduction="none")

    def new_cache(self, max_bytes: int | None = None, keep_bytes: int = 0, block_rows: int = BLOCK_ROWS) -> PagedCache:
        """An empty cache for this decoder's rows, which allocates memory as it is used. Arguments as for PagedCache."""
        options = max_bytes, keep_bytes, block_rows
        cache, *others = [PagedCache(*form[:5], *options, form[5], first) for form, first in self.cache_forms]
        cache.join(others)
        return cache

    @property
    def cache_forms(self) -> list[tuple[tuple[int, int, int, torch.dtype, torch.device, str | None], int]]:
        """The `form` and `first_layer` of each part of a PagedCache for this decoder's rows."""
        config, groups = self.config, self.layer_groups or ((self.device, 0),)
        ends = [*(first for _, first in groups[1:]), config.num_layers]
        sizes = config.num_kv_heads, config.head_dim, self.dtype
        return [
            ((end - first, *sizes, device, self.cache_codes), first)
            for (device, first), end in zip(groups, ends, strict=True)
        ]


def reserve(spans: Spans) -> None:
    """Allocate blocks for the rows that a pass with a cache adds. Raises CacheFullError."""
    for table, before, rows in zip(spans.tables, spans.before, spans.lengths, strict=True):
        table.reserve(before + rows)
