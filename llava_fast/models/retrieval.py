"""BLIP-2's stage 1: a tower and a Q-Former that compare images and texts, match them and write captions.

Shapes: B pairs of this process, A pairs of all processes, and those of connectors/retrieval_qformer. Sources: Li et al.
2023, section 3.2; salesforce/LAVIS 506965b blip2_qformer.py, Qformer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.errors import RequestError
from llava_fast.models.batch import Batch
from llava_fast.models.config import RetrievalConfig
from llava_fast.models.connectors.qformer import KeysValues
from llava_fast.models.connectors.retrieval_qformer import PADDING, RetrievalQFormer, similarities
from llava_fast.models.vlm import Inputs, LlavaModel, LlavaOutput, Logits

_PAIRS = 64  # images with their texts that `matching` runs at once
SMOOTHING = 0.1  # of the labels of contrast and captions
Gather = Callable[[Tensor], tuple[Tensor, int]]
"""Rows of this process -> (those of all processes in order, with gradients; the place of its own first among them)."""


@dataclass(frozen=True)
class StageOneOutput(LlavaOutput):
    """`losses` float32 [B] is the sum of the three, whose means over all pairs are those of the whole batch:
    `contrast` (ITC), `match` (ITM) and `caption` (ITG)."""

    contrast: Tensor | None = None
    match: Tensor | None = None
    caption: Tensor | None = None


class RetrievalModel(LlavaModel):
    """A LlavaModel whose decoder is none. Batches have one image and one text each: `instruction` int [B, L] of the
    plan, which begins with [CLS], ends with [SEP] and is padded by -1."""

    config: RetrievalConfig
    projector: RetrievalQFormer

    @property
    def device(self) -> torch.device:
        return self.projector.query_tokens.device

    @property
    def first_word(self) -> int:
        """The token with which captions begin: [DEC]. Raises ValueError for a tokenizer without it."""
        found = None if self.tokenizer is None else self.tokenizer.bos_token_id
        if found is None or found >= self.projector.config.vocabulary:
            raise ValueError("the tokenizer has no bos_token ([DEC]) with an embedding, with which captions begin")
        return int(found)

    def tower_rows(self, tiles: Tensor) -> Tensor:
        """[B, N, features] of tiles uint8 [B, 3, H, W]."""
        return self.features(tiles).unflatten(0, (len(tiles), self.config.vision.rows_per_tile))

    # ------------------------------------------------------------ scores

    @torch.inference_mode()
    def contrastive(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """How similar each image is to each text: float32 [images, texts], the largest cosine between the text and the
        image's queries, from -1 to 1 (logits_per_image of transformers' Blip2ForImageTextRetrieval). Both are encoded
        apart. images: as `Processor.tiles` takes them. Raises RequestError for a text that is too long, and
        ImageError."""
        rows, _ = self.projector.images(self._image_rows(images))
        text_rows = self.projector.texts(self._ids(texts))
        both = self.projector.image_features(rows), self.projector.text_features(text_rows)
        return similarities(*(each.float() for each in both))

    @torch.inference_mode()
    def matching(self, images: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """The probability that an image and a text match, for each pair: float32 [images, texts]. The queries read
        image and text together, so this is more exact than `contrastive`, and runs the Q-Former once a pair: let
        `contrastive` choose the pairs where there are many. Arguments and errors as there."""
        features, ids = self._image_rows(images), self._ids(texts)
        image, text = (
            each.flatten() for each in torch.meshgrid(*map(torch.arange, (len(features), len(ids))), indexing="ij")
        )
        found = []
        for first in range(0, len(image), _PAIRS):
            pairs = slice(first, first + _PAIRS)
            rows = self.projector.together(features[image[pairs].to(self.device)], ids[text[pairs].to(self.device)])
            found.append(self.projector.matching(rows).float().softmax(1)[:, 1])
        return torch.cat(found).view(len(features), len(ids))

    def _image_rows(self, images: Sequence[Any]) -> Tensor:
        if not _is_list(images):
            raise RequestError("images are a list of at least one image")
        tiles = [torch.from_numpy(self.own_processor.tiles(image)) for image in images]
        return self.tower_rows(torch.cat(tiles).to(self.device))

    def _ids(self, texts: Sequence[str]) -> Tensor:
        """[texts, L], padded."""
        if not _is_list(texts) or not all(isinstance(text, str) for text in texts):
            raise RequestError("texts are a list of at least one text")
        ids = [torch.tensor(self.tokenizer(text)["input_ids"]) for text in texts]
        most = self.projector.config.positions
        if (longest := max(map(len, ids))) > most:
            raise RequestError(f"a text has {longest} tokens, and the Q-Former reads at most {most}: shorten it")
        return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PADDING).to(self.device)

    # ------------------------------------------------------------ training

    def forward(
        self,
        batch: Batch,
        logits: Logits | None = "none",
        inputs: Inputs | None = None,
        seed: int = 0,
        gather: Gather = lambda rows: (rows, 0),
    ) -> StageOneOutput:
        """The losses of stage 1.

        seed    of the draws of negatives: with the same one, they depend on the pairs alone and not on how processes
                share them.
        gather  see Gather; default: this process is the only one.
        Raises ValueError for `logits` other than "none": there is no decoder.
        """
        if logits not in (None, "none") or inputs is not None:
            raise ValueError("this model has no decoder, and so no logits: load a language model for them (stage 2)")
        ids_BL = self._texts(batch, gather)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._tower_is_trained):
            features_BNC = self.tower_rows(batch.tiles)
        rows_BMC, before = self.projector.images(features_BNC)
        images_BMF = self.projector.image_features(rows_BMC).float()
        texts_BF = self.projector.text_features(self.projector.texts(ids_BL)).float()
        with torch.autocast(batch.tiles.device.type, enabled=False):
            to_texts_BA, to_images_BA, first = self._similarities(images_BMF, texts_BF, gather)
        contrast = _contrast(to_texts_BA, to_images_BA, first)
        drawn = _negatives(to_texts_BA, to_images_BA, first, seed)
        match = self._match(features_BNC, ids_BL, drawn, gather)
        caption = self._caption(ids_BL, before, gather)
        return StageOneOutput(None, None, contrast + match + caption, None, contrast, match, caption)

    @property
    def _tower_is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    def _texts(self, batch: Batch, gather: Gather) -> Tensor:
        """The texts' ids [B, L], as long as the longest of all processes."""
        empty = batch.flat.new_zeros(0, 1)
        ids = batch.column("instruction") if "instruction" in batch.plan.sections else empty
        longest = int(gather(ids.new_tensor([ids.shape[1]]))[0].max())
        return F.pad(ids, (0, longest - ids.shape[1]), value=PADDING).long()

    def _similarities(self, images_BMF: Tensor, texts_BF: Tensor, gather: Gather) -> tuple[Tensor, Tensor, int]:
        """(each own image to all texts, each own text to all images, the own first pair's place among all)."""
        (all_texts, first), (all_images, _) = gather(texts_BF), gather(images_BMF)
        scale = self.projector.temperature
        to_texts = similarities(images_BMF, all_texts) / scale
        return to_texts, similarities(all_images, texts_BF).T / scale, first

    def _match(
        self, features_BNC: Tensor, ids_BL: Tensor, drawn: tuple[Tensor, Tensor] | None, gather: Gather
    ) -> Tensor:
        """The pairs, each with an image and a text that are not its own: [B], the sum of three thirds. Zeros for a
        batch of one pair, which has no negatives and would teach that everything matches."""
        images, texts = [features_BNC], [ids_BL]
        all_images, all_texts = gather(features_BNC)[0], gather(ids_BL)[0]
        if drawn is not None:
            other_images, other_texts = drawn
            images += [all_images[other_images], features_BNC]
            texts += [ids_BL, all_texts[other_texts]]
        logits = self.projector.matching(self.projector.together(torch.cat(images), torch.cat(texts))).float()
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        target[: len(ids_BL)] = 1
        losses = F.cross_entropy(logits, target, reduction="none").view(len(images), len(ids_BL)).mean(0)
        return losses * 0 if drawn is None else losses  # the modules run all the same, as DDP demands

    def _caption(self, ids_BL: Tensor, before: list[KeysValues], gather: Gather) -> Tensor:
        """[B]: losses of the next tokens, weighted so that their mean over all pairs is that over all tokens."""
        ids_BL = torch.cat([torch.full_like(ids_BL[:, :1], self.first_word), ids_BL[:, 1:]], 1)
        rows_BLC = self.projector.captions(ids_BL, before)[:, :-1]
        target_BL = ids_BL[:, 1:]
        taught_BL = target_BL >= 0
        logits = self.projector.words(rows_BLC[taught_BL]).float()
        losses = F.cross_entropy(logits, target_BL[taught_BL], reduction="none", label_smoothing=SMOOTHING)
        counts_B = taught_BL.sum(1)
        sums = torch.zeros(len(ids_BL), device=losses.device)
        sums = sums.index_add(0, taught_BL.nonzero()[:, 0], losses)
        everyone = gather(counts_B)[0]
        return sums * (len(everyone) / everyone.sum().clamp(min=1))


def _is_list(given: Any) -> bool:
    """Not empty, and neither one path nor one image."""
    one = (str, bytes, bytearray, memoryview)
    return isinstance(given, Sequence) and not isinstance(given, one) and len(given) > 0


def _contrast(to_texts_BA: Tensor, to_images_BA: Tensor, first: int) -> Tensor:
    """[B]: half the loss of each image among all texts, and of each text among all images."""
    target = torch.arange(first, first + len(to_texts_BA), device=to_texts_BA.device)
    both = [
        F.cross_entropy(scores, target, reduction="none", label_smoothing=SMOOTHING)
        for scores in (to_texts_BA, to_images_BA)
    ]
    return (both[0] + both[1]) / 2


@torch.no_grad()
def _negatives(to_texts_BA: Tensor, to_images_BA: Tensor, first: int, seed: int) -> tuple[Tensor, Tensor] | None:
    """(an image for each own text, a text for each own image), drawn by the softmax of the similarities without the own
    pair; None if there is no other pair."""
    pairs, everyone = to_texts_BA.shape
    if everyone < 2:
        return None
    uniform = torch.rand(everyone, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    uniform = uniform[first : first + pairs].to(to_texts_BA.device)
    own = torch.arange(pairs, device=to_texts_BA.device)
    found = []
    for number, scores in enumerate((to_images_BA, to_texts_BA)):
        others = scores.double()
        others[own, own + first] = -torch.inf
        sums = others.softmax(1).cumsum(1)
        place = torch.searchsorted(sums, uniform[:, number, None] * sums[:, -1:], right=True)
        found.append(place.squeeze(1).clamp(max=everyone - 1))
    return found[0], found[1]
