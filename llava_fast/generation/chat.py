"""A conversation that keeps its KV cache: each turn runs only the rows that are new."""

from __future__ import annotations

from typing import Any

import torch

from llava_fast.errors import RequestError
from llava_fast.generation import engine
from llava_fast.generation.engine import Generation, Usage
from llava_fast.generation.sampling import Sampling
from llava_fast.inputs.prepared import VisualMark
from llava_fast.models.batch import Batch
from llava_fast.models.kv_cache import KVCache
from llava_fast.models.vlm import LlavaModel


class Chat:
    """Made by `model.chat()`. `messages` is the conversation so far, in the OpenAI form."""

    def __init__(self, model: LlavaModel, system: str | None = None) -> None:
        self.model = model
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget the conversation and its cache."""
        self.messages: list[dict] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._images: list[Any] = []
        self._cache: KVCache | None = None
        self._cached: list[Any] = []  # one entry a cached row: a token id, or (number of the mark, visual mark)

    @torch.inference_mode()
    def send(
        self, text: str, images: list[Any] | tuple = (), sampling: Sampling | None = None, **options: Any
    ) -> Generation:
        """One turn: the images (each as for a request), then the text; returns the answer.

        `sampling` and options as for `generate`. If anything fails, the conversation is as it was before.
        Raises RequestError when the conversation outgrows the context, ImageError for a bad image.
        """
        chosen = Sampling.of(sampling, **options)
        if not isinstance(images, (list, tuple)):
            raise RequestError(f"images must be a list, even of one image, got {type(images).__name__}")
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        sources = [*self._images, *images]
        outline = self.model.processor.outline({"messages": messages, "images": sources})
        common, rest = self._new_part(outline)
        pieces, batch = self._prepare(rest, common)
        if common and self._cache_is_outgrown(common + batch.plan.rows):
            common, rest = 0, outline
            pieces, batch = self._prepare(rest, common)
        total = common + batch.plan.rows
        limit = self.model.config.decoder.context_length
        if total >= limit:
            raise RequestError(
                f"the conversation takes {total} tokens and the context holds {limit}: reset the chat, or use "
                "smaller images"
            )
        cache = self._grown_cache(common, min(total + chosen.max_new_tokens, limit))
        row_of = self._cached[:common] + _rows(rest, pieces, first_mark=_marks(outline) - _marks(rest))
        placeholder = self.model.config.image_token_id  # which the repetition penalty counts, as transformers does
        seen = [row if isinstance(row, int) else placeholder for row in row_of]
        sequence = engine.new_sequence(self.model, chosen, seen, limit - total, chosen.seed)
        for _ in engine.steps(self.model, batch, [sequence], cache):
            pass
        self._cached = row_of + sequence.token_ids[: cache.lengths[0] - total]
        answer = sequence.text.text
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self._images = sources
        visual = sum(isinstance(row, tuple) for row in row_of)
        usage = Usage(total, visual, len(sequence.token_ids))
        return Generation(answer, sequence.token_ids, sequence.finish_reason or "length", usage)

    def _prepare(self, outline: list, common: int) -> tuple[list, Batch]:
        """The pieces of what follows the first `common` rows, and their batch."""
        tiles: list = []
        pieces = self.model.processor.pieces(outline, tiles)
        prepared = self.model.processor.assemble([pieces], tiles, first_positions=[common])
        return pieces, Batch.from_prepared(prepared, self.model.device)

    def _cache_is_outgrown(self, rows: int) -> bool:
        """Whether the cached keys have no use in a conversation of so many rows: past the decoder's own length,
        dynamic RoPE turns every key by the conversation's length."""
        decoder = self.model.config.decoder
        return decoder.rope.kind == "dynamic" and rows > decoder.max_positions

    def _new_part(self, outline: list) -> tuple[int, list]:
        """(rows that the cache already holds, what follows them); at least one row is always new."""
        rows, number, rest = 0, 0, list(outline)
        while rest:
            part = rest[0]
            if isinstance(part, VisualMark):
                held = rows
                while held < len(self._cached) and _is_mark(self._cached[held], number, part):
                    held += 1
                if held == rows or len(rest) == 1:
                    break
                rows, number = held, number + 1
                rest.pop(0)
                continue
            ids = part.ids.tolist()
            same = 0
            while same < len(ids) and rows + same < len(self._cached) and self._cached[rows + same] == ids[same]:
                same += 1
            if same == len(ids) and len(rest) == 1:
                same -= 1
            rows += same
            if same < len(ids):
                rest[0] = type(part)(part.ids[same:])
                break
            rest.pop(0)
        return rows, rest

    def _grown_cache(self, keep: int, capacity: int) -> KVCache:
        """The conversation's cache with its first `keep` rows valid and room for `capacity`."""
        if self._cache is None or self._cache.capacity < capacity:
            # Doubling keeps copying rare as a conversation grows.
            room = min(max(capacity, 2 * keep), self.model.config.decoder.context_length)
            new = self.model.decoder.new_cache(1, room)
            if self._cache is not None:
                new.copy_rows(self._cache, keep)
            self._cache = new
        self._cache.lengths[0] = keep
        self._cached = self._cached[:keep]
        return self._cache


def _rows(outline: list, pieces: list, first_mark: int) -> list[Any]:
    """What each row of the pieces is: a token id, or the visual mark it belongs to with its number."""
    rows: list[Any] = []
    number = first_mark
    for part, piece in zip(outline, pieces, strict=True):
        if isinstance(part, VisualMark):
            rows += [(number, part)] * len(piece.rows)
            number += 1
        else:
            rows += piece.ids.tolist()
    return rows


def _marks(outline: list) -> int:
    return sum(isinstance(part, VisualMark) for part in outline)


def _is_mark(cached: Any, number: int, mark: VisualMark) -> bool:
    """An image is the same if it is the very object sent before, in the same place and tiled the same way."""
    if not isinstance(cached, tuple) or cached[0] != number:
        return False
    return cached[1].source is mark.source and cached[1].alone == mark.alone
