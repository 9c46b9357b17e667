"""A conversation that keeps its rows in a KV cache, so that each turn runs only new rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from llava_fast.errors import RequestError
from llava_fast.generation.prefix_cache import PrefixCache
from llava_fast.generation.prompt import Part, Prompt, read_part
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import Generation, new_sequence
from llava_fast.inputs.plan.plan import TextPiece, VisualPiece
from llava_fast.inputs.prepared import Placeholder
from llava_fast.models.vlm import LlavaModel


class Chat:
    """Made by `model.chat()`. `messages` is the conversation so far, in OpenAI's format."""

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
        self._read: list[tuple[Placeholder, Part]] = []  # the conversation's images, opened and tiled
        runner = Runner(self.model)
        self._scheduler = Scheduler(runner, PrefixCache(runner.cache))

    def send(
        self, text: str, images: list[Any] | tuple = (), sampling: Sampling | None = None, **options: Any
    ) -> Generation:
        """Send one turn, the images (as in a request) before the text, and return the answer.

        `sampling` and options as in `generate`. If anything fails, the conversation does not change. Raises
        RequestError if the conversation exceeds the context, ImageError for an invalid image.
        """
        chosen = Sampling.of(sampling, **options)
        if not isinstance(images, (list, tuple)):
            raise RequestError(f"images must be a list, even of one image, got {type(images).__name__}")
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        sources = [*self._images, *images]
        prompt, read = self._prompt(self.model.own_processor.outline({"messages": messages, "images": sources}))
        limit = self.model.config.decoder.context_length
        if prompt.rows >= limit:
            raise RequestError(
                f"the conversation takes {prompt.rows} tokens and the context holds {limit}: reset the chat, or use "
                "smaller images"
            )
        sequence = new_sequence(self.model, prompt, chosen, chosen.seed)
        self._scheduler.add(sequence)
        try:
            while not self._scheduler.is_idle:
                self._scheduler.step()
        finally:
            self._scheduler.cancel(sequence)  # no effect unless it was interrupted
        answer = sequence.result()
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._images, self._read = sources, read
        return answer

    def _prompt(self, outline: list[TextPiece | Placeholder]) -> tuple[Prompt, list[tuple[Placeholder, Part]]]:
        """The outline's prompt and its images. An image that is the same object as before, at the same index and with
        the same tiling, is not opened again.
        """
        parts: list[Part] = []
        read: list[tuple[Placeholder, Part]] = []
        tiled: dict[tuple, Part] = {placeholder.origin: part for placeholder, part in self._read}
        for piece in outline:
            if not isinstance(piece, Placeholder):
                parts.append(Part(piece))
                continue
            known = self._read[len(read)] if len(read) < len(self._read) else None
            if known is not None and known[0].source is piece.source and known[0].alone == piece.alone:
                parts.append(_with_instruction(known[1], piece))
            else:
                parts.append(read_part(self.model.own_processor, piece, tiled))
            read.append((piece, parts[-1]))
        return Prompt(parts), read


def _with_instruction(part: Part, placeholder: Placeholder) -> Part:
    """The part of an image that was read before, for the text that stands with it now (a router reads all of it)."""
    piece = part.piece
    assert isinstance(piece, VisualPiece)
    before, now = piece.instruction, placeholder.instruction
    if before is None or now is None or np.array_equal(before, now):
        return part
    return Part(dataclasses.replace(piece, instruction=now), part.tiles)
