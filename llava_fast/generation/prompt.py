"""Prompts: text and images in order, with a key for each row by which equal rows of other prompts are recognised."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from torch import Tensor

from llava_fast.errors import ImageError, RequestError
from llava_fast.inputs.plan.plan import Piece, TextPiece, VisualPiece, encoded_rows
from llava_fast.inputs.prepared import Cut, Placeholder
from llava_fast.inputs.processor import Processor


@dataclass
class Part:
    """One piece of a prompt; an image or video also has its tiles. `encoded`: the tower has run on them for this part;
    it has not where the part's rows or its features were in a cache. `made`: its embeddings [rows, C], if they were
    made before its rows run."""

    piece: Piece
    tiles: list[Cut] = field(default_factory=list)
    encoded: bool = False
    made: Tensor | None = None

    def __len__(self) -> int:
        return len(self.piece.ids if isinstance(self.piece, TextPiece) else self.piece.rows)

    @property
    def is_visual(self) -> bool:
        return isinstance(self.piece, VisualPiece)

    @property
    def number_of_tiles(self) -> int:
        return self.piece.rows.tiles if isinstance(self.piece, VisualPiece) else 0

    @property
    def key(self) -> int:
        """Of an image or video: equal if the rows are equal, in any prompt."""
        return self.keys[0]

    @functools.cached_property
    def keys(self) -> list[int]:
        """One integer for each row. Rows with equal keys, after rows with equal keys, have equal cache entries: a text
        row's key is its token id, a visual row's (newlines included) a hash of the tiles, the row table and the
        text that the connector reads with them, plus its index.
        """
        if isinstance(self.piece, TextPiece):
            return self.piece.ids.tolist()
        digest = blake2b(digest_size=16)
        for cut in self.tiles:
            pixels, views = cut if isinstance(cut, tuple) else (cut, ())
            digest.update(repr((pixels.shape, pixels.dtype, views)).encode())
            digest.update(np.ascontiguousarray(pixels).data)
        rows = self.piece.rows
        digest.update(repr((rows.reduce, rows.stage, rows.grids, self.piece.modality)).encode())
        instruction = () if self.piece.instruction is None else (self.piece.instruction,)
        for array in (rows.kind, rows.index, *(rows.pooling or ()), *instruction):
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array).data)
        first = (1 << 160) | int.from_bytes(digest.digest(), "little") << 32  # above every token id
        return list(range(first, first + len(self)))


class Prompt:
    """The parts of one prompt in order. `rows` counts their rows, `visual_rows` those of images and videos,
    `encoded_rows` the first ones, which an encoder reads before any other runs (0: there is none). `routed`: the prompt
    without the optional rows that a router left out, once it has chosen (Runner.route)."""

    routed: Prompt | None = None

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.rows = sum(map(len, self.parts))
        self.visual_rows = sum(len(part) for part in self.parts if part.is_visual)
        self.encoded_rows = encoded_rows([part.piece for part in self.parts])

    @functools.cached_property
    def keys(self) -> list[int]:
        """Every row's key (see Part)."""
        return [key for part in self.parts for key in part.keys]

    def ids(self, placeholder: int) -> list[int]:
        """The token ids that a repetition penalty counts: those of the text, also around tiles, and, as in
        transformers, the image placeholder where there are visual rows. Not those that an encoder reads."""
        ids: list[int] = []
        if self.encoded_rows:
            return self.keys[self.encoded_rows :]
        for part in self.parts:
            piece = part.piece
            ids += (piece.ids if isinstance(piece, TextPiece) else piece.rows.token_ids).tolist()
        return ids + [placeholder] * (self.visual_rows > 0)

    def between(self, first: int, last: int) -> tuple[list[Part], int]:
        """(parts, the first row of each) for rows [first, last). Text is cut to these rows; an image is returned
        whole.
        """
        parts: list[Part] = []
        begin, start = first, 0
        for part in self.parts:
            end = start + len(part)
            if start < last and first < end:
                if isinstance(part.piece, TextPiece):
                    parts.append(Part(TextPiece(part.piece.ids[max(first - start, 0) : last - start])))
                else:
                    parts.append(part)
                    begin = min(begin, start)
            start = end
        return parts, begin


def read_prompt(processor: Processor | None, request: Any, number: int = 0) -> Prompt:
    """As `prompt_of`; its errors name the request by its "id" or number."""
    try:
        return prompt_of(processor, request)
    except (RequestError, ImageError) as error:
        name = request.get("id", number) if isinstance(request, dict) else number
        raise type(error)(f"request {name}: {error}") from None


def prompt_of(processor: Processor | None, request: Any, before_part: Callable[[], None] = lambda: None) -> Prompt:
    """A request's prompt, with its images read and tiled. before_part: called before each part, text or an image; what
    it raises ends the work. Raises RequestError and ImageError."""
    if processor is None:
        raise RequestError("this model has no processor: build it with llava_fast.load, or pass one to LlavaModel")
    parts: list[Part] = []
    known: dict[tuple, Part] = {}
    for part in processor.outline(request):
        before_part()
        parts.append(read_part(processor, part, known))
    prompt = Prompt(parts)
    processor.check_length([part.piece for part in prompt.parts])
    return prompt


def read_part(processor: Processor, part: TextPiece | Placeholder, known: dict[tuple, Part] | None = None) -> Part:
    """One part of an outline; an image is read and tiled. known: the parts read before, by their `origin`, to which it
    is added; an image among them is not read again. Raises RequestError and ImageError."""
    if isinstance(part, Placeholder) and known is not None and part.origin in known:
        first = known[part.origin]
        assert isinstance(first.piece, VisualPiece)
        return Part(dataclasses.replace(first.piece, instruction=part.instruction), first.tiles)
    tiles: list[Cut] = []
    (piece,) = processor.pieces([part], tiles)
    made = Part(piece, tiles)
    if isinstance(part, Placeholder) and known is not None:
        known[part.origin] = made
    return made
