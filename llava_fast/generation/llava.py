"""`Llava`: the model users hold, with generate, stream and chat over the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from llava_fast.errors import RequestError
from llava_fast.generation import engine
from llava_fast.generation.chat import Chat
from llava_fast.generation.engine import Generation, Usage
from llava_fast.generation.sampling import Sampling
from llava_fast.models.vlm import LlavaModel


class Llava(LlavaModel):
    """A loaded checkpoint: an ordinary nn.Module that also answers requests."""

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[dict] | dict, sampling: Sampling | None = None, **options: Any
    ) -> list[Generation]:
        """Answer a batch of requests; each gets what it would get alone.

        requests  dicts {"prompt" | "messages", "images", "video", "seed"}; see inputs.processor.
        sampling  how to generate (see Sampling); default: greedy, at most 128 tokens.
        options   fields of Sampling by keyword, in place of the ones in `sampling`.

        Raises RequestError or ImageError naming the request.
        """
        chosen = Sampling.of(sampling, **options)
        requests = [requests] if isinstance(requests, dict) else list(requests)
        if not requests:
            return []
        batch, sequences, cache = self._start(requests, chosen)
        for _ in engine.steps(self, batch, sequences, cache):
            pass
        return [
            Generation(s.text.text, s.token_ids, s.finish_reason or "length", self._usage(batch, number, s))
            for number, s in enumerate(sequences)
        ]

    def stream(self, request: dict, sampling: Sampling | None = None, **options: Any) -> Iterator[str]:
        """Text pieces of one answer as they become certain: never half a character, never part of a stop string.
        Their concatenation is what `generate` returns. Arguments and errors as for `generate`, raised at once."""
        with torch.inference_mode():
            started = self._start([request], Sampling.of(sampling, **options), pieces=True)
        return self._pieces(engine.steps(self, *started))

    @staticmethod
    def _pieces(running: Iterator[list[tuple[engine.Sequence, str]]]) -> Iterator[str]:
        while True:
            # The mode is entered for each step, not across yields, where it would leak into the caller's code.
            with torch.inference_mode():
                moved = next(running, None)
            if moved is None:
                return
            for _, piece in moved:
                if piece:
                    yield piece

    def chat(self, system: str | None = None) -> Chat:
        """A conversation on one cache: an image is encoded once, however many questions follow."""
        return Chat(self, system)

    def _start(self, requests: list[dict], sampling: Sampling, pieces: bool = False):
        """Prepared batch, sequences and a cache that holds prompt and answer of each. `pieces`: as for TextDecoder."""
        batch = self.prepare(requests)
        limit = self.config.decoder.context_length
        capacity = min(max(batch.plan.lengths) + sampling.max_new_tokens, limit)
        sequences = []
        for number, (request, length) in enumerate(zip(requests, batch.plan.lengths, strict=True)):
            seed = request.get("seed")
            if seed is None and sampling.seed is not None:
                seed = sampling.seed + number
            room = limit - length
            if room <= 0 and sampling.max_new_tokens:
                name = request.get("id", number)
                raise RequestError(f"request {name} fills the context of {limit} tokens: no room for an answer")
            penalised = sampling.repetition_penalty != 1.0
            ids = engine.prompt_ids(batch, number, self.config.image_token_id) if penalised else []
            sequences.append(engine.new_sequence(self, sampling, ids, room, seed, pieces))
        return batch, sequences, self.decoder.new_cache(len(requests), capacity)

    @staticmethod
    def _usage(batch, number: int, sequence: engine.Sequence) -> Usage:
        return Usage(batch.plan.lengths[number], engine.visual_tokens(batch, number), len(sequence.token_ids))
