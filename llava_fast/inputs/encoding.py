"""Text to token ids: a rendered prompt with placeholders, encoded once, with label masks from character spans."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llava_fast.inputs.chat.rendering import Segment
from llava_fast.inputs.labels import supervised_tokens
from llava_fast.inputs.literal import Hidden, LiteralText

ORIGINAL_IMAGE_TOKEN = -200
"""The placeholder id for original LLaVA checkpoints, whose vocabulary has no image token (llava/constants.py)."""
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(ids int32 [S], supervised bool [S], indices of the image and video tokens among the ids). Without labels no token is
supervised."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and the tokens that stand for images and videos; its fields are those of Processor."""

    tokenizer: Any
    image_token_id: int
    video_token_id: int | None = None
    images_before_bos: bool = False

    @functools.cached_property
    def literal(self) -> LiteralText:
        """The encoder for the option `literal_text`."""
        return LiteralText(self.tokenizer, ("<image>", "<video>"))

    def tokens(self, text: str, special: bool, offsets: bool, hidden: Hidden | None) -> tuple[list[int], Any]:
        """(ids, character spans if `offsets`) of a text, some of whose characters may be replaced by stand-ins."""
        if hidden is not None:
            plain = hidden.restore(text)
            if self.literal.needs_names(text, plain):
                return self.literal.encode(text, hidden, special)
            text = plain
        # Not verbose: a prompt that is too long is refused by name (check_length), in place of a warning.
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=offsets, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"] if offsets else None

    def encode(
        self, segments: list[Segment], placeholders: re.Pattern, labels: bool, rendered: bool, hidden: Hidden | None
    ) -> Encoded:
        """The tokens of a prompt, whose placeholders match the pattern `placeholders`.

        rendered  whether a chat template wrote the text, which may then begin with the BOS token.
        hidden    the stand-ins in the text, for literal text.
        """
        if self.image_token_id == ORIGINAL_IMAGE_TOKEN:
            return self._encode_chunks(segments, placeholders, labels, hidden)
        tokens = {"<image>": self.image_token_id, "<video>": self.video_token_id or self.image_token_id}
        names = {placeholder: self.tokenizer.convert_ids_to_tokens(token) for placeholder, token in tokens.items()}
        if any(placeholder != name for placeholder, name in names.items()):  # the checkpoint's spelling
            segments = [replace(each, text=_spelt(each.text, placeholders, names)) for each in segments]
        text = "".join(segment.text for segment in segments)
        first = _leading(text, names) if self.images_before_bos else []
        before = sum(len(names[placeholder]) for placeholder in first)
        token_ids = [tokens[placeholder] for placeholder in first]
        spans = [np.zeros((len(first), 2), np.int64)]
        done = 0
        for number, part in enumerate(_parts(segments)):
            skipped = 0 if number else before
            special = not (number or (rendered and self._brings_bos(text)))
            ids_of_part, found = self.tokens(part[skipped:], special, labels, hidden)
            token_ids += ids_of_part
            if labels:
                at = np.asarray(found).reshape(-1, 2)
                spans.append(np.where(at[:, 1:] > 0, at + done + skipped, 0))
            done += len(part)
        ids = np.asarray(token_ids, np.int32)
        supervised = supervised_tokens(np.concatenate(spans), segments) if labels else np.zeros(len(ids), bool)
        is_image = ids == tokens["<image>"]
        if tokens["<video>"] != tokens["<image>"]:
            is_image |= ids == tokens["<video>"]
        return ids, supervised, np.flatnonzero(is_image)

    def _encode_chunks(
        self, segments: list[Segment], placeholders: re.Pattern, labels: bool, hidden: Hidden | None
    ) -> Encoded:
        """`encode` for original LLaVA, which tokenises the text between placeholders in chunks and keeps the first
        chunk's BOS."""
        ids: list[int] = []
        places: list[int] = []
        supervised: list[np.ndarray] = []
        offset, bos = 0, self.tokenizer.bos_token_id
        for number, part in enumerate(_parts(segments)):
            for chunk_number, chunk in enumerate(placeholders.split(part)):
                if chunk_number:
                    places.append(len(ids))
                    ids.append(ORIGINAL_IMAGE_TOKEN)
                    supervised.append(np.zeros(1, bool))
                    offset += len("<image>")
                special = not self._brings_bos(chunk)
                encoded, offsets = self.tokens(chunk, special, labels, hidden)
                token_ids = list(encoded)
                drop = 1 if (number or chunk_number) and token_ids and token_ids[0] == bos else 0
                ids += token_ids[drop:]
                if labels:
                    spans = np.asarray(offsets).reshape(-1, 2)[drop:]
                    supervised.append(supervised_tokens(np.where(spans[:, 1:] > 0, spans + offset, 0), segments))
                offset += len(chunk)
        marked = np.concatenate(supervised) if labels else np.zeros(len(ids), bool)
        return np.asarray(ids, np.int32), marked, np.asarray(places)

    def single_tokens(self, texts: Iterable[str]) -> list[int]:
        """The ids of the texts that are a single token; the others are left out."""
        encoded = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [ids[0] for ids in encoded if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id]

    def _brings_bos(self, text: str) -> bool:
        """Whether a rendered prompt already starts with the BOS token, so that the tokenizer must not add another."""
        bos = self.tokenizer.bos_token
        return bos is not None and text.startswith(bos)


def _parts(segments: Sequence[Segment]) -> list[str]:
    """Their texts as they are tokenised: joined, but for cuts. At least one."""
    parts = [""]
    for segment in segments:
        if segment.cut:
            parts.append("")
        parts[-1] += segment.text
    return [part for part in parts if part] or [""]


def _spelt(text: str, placeholders: re.Pattern, names: dict[str, str]) -> str:
    return placeholders.sub(lambda found: names[found[0]], text)


def _leading(text: str, names: dict[str, str]) -> list[str]:
    """The placeholders with which a text begins, in the checkpoint's spelling (`names`)."""
    found: list[str] = []
    while text and (placeholder := next((each for each, name in names.items() if text.startswith(name)), None)):
        found.append(placeholder)
        text = text[len(names[placeholder]) :]
    return found
