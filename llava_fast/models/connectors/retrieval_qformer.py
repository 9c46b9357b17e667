"""The Q-Former of BLIP-2's stage 1: queries and text run apart, together, or the text as a caption that the queries
begin; with the heads that compare, match and write.

Shapes: B pairs of an image and a text, N rows of a tile, C width, M queries, L tokens of text, F features, V
vocabulary. Parameter names are those of transformers' Blip2ForImageTextRetrieval; those that it lacks (`cls`,
`temperature`) LAVIS'. Dropout is not applied. Sources: Li et al. 2023 (BLIP-2), section 3; transformers 5.24
modeling_blip_2.py; salesforce/LAVIS 506965b blip2_qformer.py, Qformer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models import fused
from llava_fast.models.connectors.base import Connector
from llava_fast.models.connectors.qformer import KeysValues, Layer, QFormerConfig, TextEmbeddings

FIRST_TEMPERATURE = 0.07
PADDING = -1  # of ids


@dataclass(frozen=True)
class RetrievalQFormerConfig(QFormerConfig):
    """`out_features` (F) is the width of what is compared. Costs are those of its queries, which run with the text too:
    in stage 1 once alone and three times with a text."""

    def build(self) -> RetrievalQFormer:  # type: ignore[override]  # another connector over the same layers
        return RetrievalQFormer(self)

    @property
    def matrix_size(self) -> int:
        return 4 * super().matrix_size

    @property
    def first_matrix_size(self) -> int:
        return 4 * super().first_matrix_size

    def kept_per_row(self, trained: bool) -> int:
        return 4 * super().kept_per_row(trained)


class RetrievalQFormer(Connector):
    """Its methods take a tile's rows [B, N, in_features] and ids int [B, L] with padding -1 on the right."""

    def __init__(self, config: RetrievalQFormerConfig) -> None:
        super().__init__()
        self.config: RetrievalQFormerConfig = config
        width = config.hidden_size
        self.query_tokens = nn.Parameter(torch.randn(1, config.queries, width) * 0.02)
        self.embeddings = TextEmbeddings(config)
        layers = nn.ModuleList(Layer(config, config.attends_tile(number)) for number in range(config.num_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.vision_projection = nn.Linear(width, config.out_features)
        self.text_projection = nn.Linear(width, config.out_features)
        self.itm_head = nn.Linear(width, 2)
        self.cls = nn.ModuleDict({"predictions": WordHead(config)})
        self.temperature = nn.Parameter(torch.full((1,), FIRST_TEMPERATURE))  # FSDP2 takes no scalar

    @property
    def layers(self) -> list[Layer]:
        return [cast(Layer, layer) for layer in cast(nn.ModuleList, self.encoder["layer"])]

    def images(self, features_BNC: Tensor) -> tuple[Tensor, list[KeysValues]]:
        """([B, M, C]: the queries after the last layer; each layer's keys and values of them, for `captions`)."""
        x_BMC = self.embeddings.layernorm(self.query_tokens)
        before = []
        for layer in self.layers:
            x_BMC, (key, value) = layer.queries_alone(x_BMC, features_BNC)
            before.append((key.expand(len(features_BNC), -1, -1), value.expand(len(features_BNC), -1, -1)))
        return x_BMC, before

    def texts(self, ids_BL: Tensor) -> Tensor:
        """[B, L, C]: the text alone, each token attending to all."""
        mask = (ids_BL >= 0)[:, None, None]
        x_BLC = self.embeddings(None, ids_BL)
        for layer in self.layers:
            x_BLC = layer.text_alone(x_BLC, mask)
        return x_BLC

    def together(self, features_BNC: Tensor, ids_BL: Tensor) -> Tensor:
        """[B, M, C]: the queries, which attend to the text and it to them."""
        queries = self.config.queries
        mask = F.pad(ids_BL >= 0, (queries, 0), value=True)[:, None, None]
        x_BRC = self.embeddings(self.query_tokens.expand(len(ids_BL), -1, -1), ids_BL)
        for layer in self.layers:
            x_BRC = layer(x_BRC, features_BNC, mask)
        return x_BRC[:, :queries]

    def captions(self, ids_BL: Tensor, before: list[KeysValues]) -> Tensor:
        """[B, L, C]: a text of which each token attends to the queries (`before`, from `images`) and to those before
        it. The queries do not attend to the text, so their keys and values are those of the image alone."""
        length, queries = ids_BL.shape[1], self.config.queries
        own = (ids_BL >= 0)[:, None] & torch.ones(length, length, dtype=torch.bool, device=ids_BL.device).tril()
        mask = F.pad(own, (queries, 0), value=True)[:, None]
        x_BLC = self.embeddings(None, ids_BL)
        for layer, known in zip(self.layers, before, strict=True):
            x_BLC = layer.text_alone(x_BLC, mask, known)
        return x_BLC

    def image_features(self, rows_BMC: Tensor) -> Tensor:
        """[B, M, F], of length 1, from `images`."""
        return F.normalize(self.vision_projection(rows_BMC), dim=-1)

    def text_features(self, rows_BLC: Tensor) -> Tensor:
        """[B, F], of length 1, from `texts`: of the first token."""
        return F.normalize(self.text_projection(rows_BLC[:, 0]), dim=-1)

    def matching(self, rows_BMC: Tensor) -> Tensor:
        """Logits [B, 2] of not matching and matching, from `together`: the mean over the queries."""
        return self.itm_head(rows_BMC).mean(1)

    def words(self, rows_RC: Tensor) -> Tensor:
        """Logits [R, V] of the next token, from rows of `captions`."""
        head = cast(WordHead, self.cls["predictions"])
        return head(rows_RC, self.embeddings.word_embeddings.weight)


class WordHead(nn.Module):
    """BERT's head, whose matrix is the word embedding."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": norm})
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))
        self.activation = config.activation

    def forward(self, rows_RC: Tensor, table_VC: Tensor) -> Tensor:
        made = fused.activated(rows_RC, self.transform["dense"], self.activation)
        return F.linear(self.transform["LayerNorm"](made), table_VC, self.bias)


def similarities(images_IMF: Tensor, texts_TF: Tensor) -> Tensor:
    """[I, T]: the largest cosine between a text and an image's queries."""
    return torch.einsum("imf,tf->imt", images_IMF, texts_TF).max(1).values
