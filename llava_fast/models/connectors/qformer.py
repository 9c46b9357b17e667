"""The Q-Former: learned queries that attend to each other in every layer, and to a tile's rows in every second one.
With text, all attend to the text too, but only queries attend to the tile.

Shapes: T tiles, N rows per tile, C width, M queries, L tokens of text, R = M or M + L. Parameter names are those of
transformers' Blip2QFormerModel and InstructBlipQFormerModel. Dropout is not applied. Sources: Li et al. 2023 (BLIP-2);
Dai et al. 2023 (InstructBLIP); transformers 5.24 modeling_blip_2.py, modeling_instructblip.py; salesforce/LAVIS 506965b
Qformer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models import fused
from llava_fast.models.connectors.base import Connector, ConnectorConfig, check_activation

KeysValues = tuple[Tensor, Tensor]
"""Keys and values [T, rows, C] of a self-attention's rows."""


@dataclass(frozen=True)
class QFormerConfig(ConnectorConfig):
    """`queries` rows of a tile's `rows`. Layers 0, `cross_every`, ... attend to the tile. `vocabulary`, `positions`: of
    the text; 0: it reads none. A row's costs are those of a query; text's have their own names. Raises ValueError for
    an unknown activation and for heads that do not divide the width."""

    rowwise = False

    in_features: int
    out_features: int
    rows: int
    queries: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    cross_every: int = 2
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    vocabulary: int = 0
    positions: int = 0

    def __post_init__(self) -> None:
        check_activation(self.activation)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"a Q-Former of hidden_size {self.hidden_size} has no {self.num_heads} equal heads")

    @property
    def reads_text(self) -> bool:
        return self.vocabulary > 0

    @property
    def text_limits(self) -> tuple[int, int]:
        return self.positions, self.vocabulary

    def rows_of(self, rows: int) -> int:
        if rows != self.rows:
            raise ValueError(f"the Q-Former reads {self.rows} rows per tile, and the tower gives {rows}")
        return self.queries

    def attends_tile(self, layer: int) -> bool:
        return layer % self.cross_every == 0

    @property
    def cross_layers(self) -> int:
        return sum(map(self.attends_tile, range(self.num_layers)))

    @property
    def matrix_size(self) -> int:
        width = self.hidden_size
        own = self.num_layers * 2 * width * (2 * width + self.intermediate_size) + self.cross_layers * 2 * width**2
        return self.first_matrix_size + own + width * self.out_features

    @property
    def first_matrix_size(self) -> int:
        """Keys and values of the cross-attentions. Each query accounts for several rows of the tile."""
        return round(self.cross_layers * 2 * self.hidden_size * self.in_features * self.rows / self.queries)

    @property
    def text_matrix_size(self) -> int:
        """The last layer's text is computed too, though nothing reads it."""
        width = self.hidden_size
        return self.reads_text * self.num_layers * 2 * width * (2 * width + self.intermediate_size)

    @property
    def kept_per_text_row(self) -> int:
        return self.reads_text * self.num_layers * (9 * self.hidden_size + 2 * self.intermediate_size)

    def kept_per_row(self, trained: bool) -> int:
        width, rows = self.hidden_size, self.rows / self.queries
        own = self.num_layers * (9 * width + 2 * self.intermediate_size) + self.cross_layers * 6 * width
        return round(own + self.cross_layers * 2 * rows * width + trained * (rows * self.in_features + width))

    def build(self) -> QFormer:
        return QFormer(self)


class QFormer(Connector):
    """[T, N, in_features], and with text its ids [T, L] -> [T, M, out_features]."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config: QFormerConfig = config
        width = config.hidden_size
        self.query_tokens = nn.Parameter(torch.randn(1, config.queries, width) * 0.02)
        if config.reads_text:
            self.embeddings = TextEmbeddings(config)
        else:
            self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        layers = nn.ModuleList(Layer(config, config.attends_tile(number)) for number in range(config.num_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.language_projection = nn.Linear(width, config.out_features)

    def forward(self, features_TNC: Tensor, instruction: Tensor | None = None) -> Tensor:
        """Without text the queries are the same for every tile until the first cross-attention, so they run once.
        `instruction` as for ConnectorConfig.reads_text. Raises ValueError if it is missing."""
        mask, queries = None, self.config.queries
        if self.config.reads_text and instruction is None:
            raise ValueError(
                "this Q-Former reads the question with each image, and none is given: make the plan with the processor "
                "of llava_fast.load"
            )
        if instruction is None:
            x_TRC = self.layernorm(self.query_tokens)
        else:
            x_TRC = self.embeddings(self.query_tokens.expand(len(features_TNC), -1, -1), instruction)
            mask = F.pad(instruction >= 0, (queries, 0), value=True)[:, None, None]
        for layer in cast(nn.ModuleList, self.encoder["layer"]):
            x_TRC = layer(x_TRC, features_TNC, mask)
        return self.language_projection(x_TRC[:, :queries])


class TextEmbeddings(nn.Module):
    """Queries, then the text's tokens with positions, normalised."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.positions, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, queries_TMC: Tensor | None, ids_TL: Tensor) -> Tensor:
        place = torch.arange(ids_TL.shape[1], device=ids_TL.device)
        text_TLC = self.word_embeddings(ids_TL.clamp(min=0)) + self.position_embeddings(place)
        return self.layernorm(text_TLC if queries_TMC is None else torch.cat([queries_TMC, text_TLC], dim=1))


class Layer(nn.Module):
    def __init__(self, config: QFormerConfig, attends_tile: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = Attention(config, SelfAttention(width, config.num_heads))
        self.crossattention = None
        if attends_tile:
            self.crossattention = Attention(config, CrossAttention(width, config.num_heads, config.in_features))
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output_query = Output(config, inner)
        if config.reads_text:
            self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
            self.output = Output(config, inner)
        self.queries, self.activation = config.queries, config.activation

    def forward(self, x_TRC: Tensor, features_TNC: Tensor, mask: Tensor | None = None) -> Tensor:
        x_TRC = self.attention(x_TRC, mask)
        x_TMC = x_TRC[:, : self.queries]
        if self.crossattention is not None:
            x_TMC = self.crossattention(x_TMC.expand(len(features_TNC), -1, -1), features_TNC)
        made = self.output_query(fused.activated(x_TMC, self.intermediate_query["dense"], self.activation), x_TMC)
        if mask is None:
            return made
        return torch.cat([made, self._told(x_TRC[:, self.queries :])], dim=1)

    def queries_alone(self, x_TMC: Tensor, features_TNC: Tensor) -> tuple[Tensor, KeysValues]:
        """`forward` without text, and the queries' keys and values for `text_alone`."""
        inner = cast(SelfAttention, self.attention.attention)
        return self(x_TMC, features_TNC), inner.keys_values(x_TMC)

    def text_alone(self, x_TLC: Tensor, mask: Tensor, before: KeysValues | None = None) -> Tensor:
        """Text without queries, which also attends to rows with these keys and values. mask: bool, True where a row
        attends to a key, those of `before` first."""
        inner = cast(SelfAttention, self.attention.attention)
        return self._told(self.attention.output(inner(x_TLC, mask, before), x_TLC))

    def _told(self, text_TLC: Tensor) -> Tensor:
        return self.output(fused.activated(text_TLC, self.intermediate["dense"], self.activation), text_TLC)


class Attention(nn.Module):
    def __init__(self, config: QFormerConfig, inner: SelfAttention | CrossAttention) -> None:
        super().__init__()
        self.attention = inner
        self.output = Output(config, config.hidden_size)

    def forward(self, x_TRC: Tensor, other: Tensor | None) -> Tensor:
        """`other`: the mask of a self-attention, the rows that a cross-attention attends to."""
        return self.output(self.attention(x_TRC, other), x_TRC)


class Output(nn.Module):
    """The end of each part of a layer: a Linear, the sum with the part's input, a LayerNorm."""

    def __init__(self, config: QFormerConfig, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, inner: Tensor, x: Tensor) -> Tensor:
        return fused.add_norm(x, self.dense(inner), self.LayerNorm)[1]


class SelfAttention(fused.MergesLinears):
    merges: ClassVar = {"qkv_proj": ("query", "key", "value")}

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x_TRC: Tensor, mask: Tensor | None, before: KeysValues | None = None) -> Tensor:
        query, key, value = self.project(x_TRC, "qkv_proj")
        if before is not None:
            key, value = (torch.cat([first, own], 1) for first, own in zip(before, (key, value), strict=True))
        return _attend(self.heads, query, key, value, mask=mask)

    def keys_values(self, x_TRC: Tensor) -> KeysValues:
        _, key, value = self.project(x_TRC, "qkv_proj")
        return key, value


class CrossAttention(fused.MergesLinears):
    merges: ClassVar = {"kv_proj": ("key", "value")}

    def __init__(self, width: int, heads: int, in_features: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key, self.value = (nn.Linear(in_features, width) for _ in range(2))

    def forward(self, x_TMC: Tensor, features_TNC: Tensor) -> Tensor:
        return _attend(self.heads, self.query(x_TMC), *self.project(features_TNC, "kv_proj"))


def _attend(heads: int, *query_key_value: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = (rows.unflatten(-1, (heads, -1)).transpose(1, 2) for rows in query_key_value)
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
