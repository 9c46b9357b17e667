"""OpenAI's answers: one JSON object, or server-sent events of chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from typing import Any

from llava_fast.generation.sequence import Sequence
from llava_fast.serve.engine import Step
from llava_fast.serve.errors import api_error


class ChatAnswer:
    """The answer to one chat request, as its sequences run."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, sequences: list[Sequence]) -> None:
        self.model, self.sequences = model, sequences
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    async def whole(self, steps: AsyncIterator[tuple[int, Step]]) -> dict[str, Any]:
        """All choices, when all sequences have ended."""
        async for _ in steps:
            pass
        choices = [self._choice(number, sequence) for number, sequence in enumerate(self.sequences)]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage()}

    async def events(self, steps: AsyncIterator[tuple[int, Step]], with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events: chunks as text becomes certain, then [DONE]. An error is the last event."""
        try:
            for chunk in self._first(with_usage):
                yield chunk
            async for number, step in steps:
                if step.text or step.finished:
                    yield self._chunk([self._delta(number, step)], with_usage)
            if with_usage:
                yield _event({**self._head(self.chunk_kind), "choices": [], "usage": self.usage()})
        except Exception as error:
            yield _event(api_error(error).body)
        yield "data: [DONE]\n\n"

    def usage(self) -> dict[str, Any]:
        prompt = self.sequences[0].prompt
        answer = sum(len(sequence.token_ids) for sequence in self.sequences)
        return {
            "prompt_tokens": prompt.rows,
            "completion_tokens": answer,
            "total_tokens": prompt.rows + answer,
            "prompt_tokens_details": {
                "cached_tokens": self.sequences[0].cached_rows,
                "visual_tokens": prompt.visual_rows,
            },
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]], with_usage: bool) -> str:
        return _event({**self._head(self.chunk_kind), "choices": choices, **({"usage": None} if with_usage else {})})

    def _first(self, with_usage: bool) -> Iterable[str]:
        for number in range(len(self.sequences)):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": number, "delta": delta, "logprobs": None, "finish_reason": None}], with_usage)

    def _choice(self, number: int, sequence: Sequence) -> dict[str, Any]:
        message = {"role": "assistant", "content": sequence.text.text, "refusal": None}
        return {"index": number, "message": message, "logprobs": None, "finish_reason": sequence.finish_reason}

    def _delta(self, number: int, step: Step) -> dict[str, Any]:
        reason = step.sequence.finish_reason if step.finished else None
        delta = {"content": step.text} if step.text else {}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
