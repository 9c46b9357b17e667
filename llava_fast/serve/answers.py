"""Responses in OpenAI's format: one JSON object, or a stream of chunks as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from llava_fast.generation.sampling import TokenLogprob
from llava_fast.generation.sequence import Sequence
from llava_fast.serve.engine import Step
from llava_fast.serve.errors import api_error

Bytes = Callable[[int], bytes]
"""Maps a token id to its bytes."""


class Answer:
    """Builds the response to one request while its sequences run. Choices have the indices of their sequences."""

    kind = chunk_kind = prefix = ""

    def __init__(self, model: str, sequences: list[Sequence], token_bytes: Bytes) -> None:
        self.model, self.sequences, self.token_bytes = model, sequences, token_bytes
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.told = [0] * len(sequences)  # per sequence: tokens whose log probabilities were sent
        self.offsets = [0] * len(sequences)  # per sequence: characters of text of these tokens

    async def whole(self, steps: AsyncIterator[tuple[int, Step]]) -> dict[str, Any]:
        """Return the complete response once all sequences have finished."""
        async for _ in steps:
            pass
        choices = [
            {
                "index": number,
                **self._message(sequence.text.text),
                "logprobs": self._logprobs(number, len(sequence.token_ids)),
                "finish_reason": sequence.finish_reason,
            }
            for number, sequence in enumerate(self.sequences)
        ]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage()}

    async def events(self, steps: AsyncIterator[tuple[int, Step]], with_usage: bool) -> AsyncIterator[str]:
        """Yield server-sent events: chunks with the new text, then [DONE]. An error event ends the stream."""
        usage = {"usage": None} if with_usage else {}
        try:
            for number in range(len(self.sequences)):
                if (first := self._first()) is not None:
                    yield self._chunk(number, first, None, None, usage)
            async for number, step in steps:
                if step.text or step.finished:
                    reason = step.sequence.finish_reason if step.finished else None
                    logprobs = self._logprobs(number, step.tokens)
                    yield self._chunk(number, self._delta(step.text), logprobs, reason, usage)
            if with_usage:
                yield _event({**self._head(self.chunk_kind), "choices": [], "usage": self.usage()})
        except Exception as error:
            yield _event(api_error(error).body)
        yield "data: [DONE]\n\n"

    def usage(self) -> dict[str, Any]:
        """Return the usage field. A prompt shared by several choices is counted once."""
        prompts = {id(sequence.prompt): sequence for sequence in reversed(self.sequences)}.values()  # one each
        asked = sum(sequence.prompt.rows for sequence in prompts)
        answered = sum(len(sequence.token_ids) for sequence in self.sequences)
        return {
            "prompt_tokens": asked,
            "completion_tokens": answered,
            "total_tokens": asked + answered,
            "prompt_tokens_details": {
                "cached_tokens": sum(sequence.reused_rows or 0 for sequence in prompts),
                "visual_tokens": sum(sequence.prompt.visual_rows for sequence in prompts),
                "images": [image for sequence in prompts for image in _images(sequence)],
            },
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, number: int, content: dict[str, Any], logprobs: Any, reason: str | None, usage: dict) -> str:
        choice = {"index": number, **content, "logprobs": logprobs, "finish_reason": reason}
        return _event({**self._head(self.chunk_kind), "choices": [choice], **usage})

    def _logprobs(self, number: int, tokens: int) -> Any:
        """Return the log probabilities of the unsent tokens before index `tokens`, without the end token."""
        sequence = self.sequences[number]
        if sequence.sampler.options.logprobs is None:
            return None
        new = sequence.sampler.logprobs[self.told[number] : tokens]
        self.told[number] = tokens
        return self._told(number, [each for each in new if each.token_id not in sequence.end_ids])

    def _text(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="replace")

    def _message(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _first(self) -> dict[str, Any] | None:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _told(self, number: int, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        raise NotImplementedError


class ChatAnswer(Answer):
    """A response of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _first(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _told(self, number: int, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self._text(token), "logprob": finite(logprob), "bytes": list(self.token_bytes(token))}

        return {
            "content": [
                {**one(each.token_id, each.logprob), "top_logprobs": [one(*top) for top in each.top]}
                for each in logprobs
            ],
            "refusal": None,
        }


class CompletionAnswer(Answer):
    """A response of /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _first(self) -> None:
        return None

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _told(self, number: int, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        tokens = [self._text(each.token_id) for each in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self.offsets[number])
            self.offsets[number] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [finite(each.logprob) for each in logprobs],
            "top_logprobs": [{self._text(token): finite(value) for token, value in each.top} for each in logprobs],
            "text_offset": offsets,
        }


def _images(sequence: Sequence) -> list[dict[str, Any]]:
    """Return the tokens and tiles of each image or video in order, and the source of its features: the vision tower
    ("encoded") or one of the caches."""
    images, end = [], 0
    for part in sequence.prompt.parts:
        end += len(part)
        if part.is_visual:
            kept = "prefix_cache" if end <= (sequence.reused_rows or 0) else "feature_cache"
            source = "encoded" if part.encoded else kept
            images.append({"tokens": len(part), "tiles": part.number_of_tiles, "source": source})
    return images


def finite(logprob: float) -> float:
    """Return -9999 for the log probability of an impossible token, as OpenAI does: JSON has no infinity."""
    return max(logprob, -9999.0)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
