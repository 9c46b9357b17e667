"""Replies, and the file that stores them unchanged.

A line is {"key", "name", "reply"} with the endpoint's JSON, or {"key", "name", "failed"} with the reason of the
failure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from llava_fast.errors import EndpointError
from llava_fast.storage.journal import Journal, without


class MalformedReply(ValueError):
    """The response is not a valid chat completion. The message names the defect."""


@dataclass(frozen=True)
class Reply:
    """A chat completion.

    text     the generated text, possibly empty.
    finish   the finish reason: stop, length, content_filter, ...
    refusal  the refusal that some endpoints return instead of a text.
    prompt_tokens, reply_tokens   as reported by the endpoint, else 0.
    raw      the endpoint's JSON.
    """

    text: str
    finish: str
    refusal: str
    prompt_tokens: int
    reply_tokens: int
    raw: dict[str, Any]

    @property
    def is_whole(self) -> bool:
        """Whether the text is complete (finish reason "stop")."""
        return self.finish == "stop" and bool(self.text.strip()) and not self.refusal

    @staticmethod
    def read(raw: Any) -> Reply:
        """Raises MalformedReply."""
        if not isinstance(raw, dict):
            raise MalformedReply(f"a JSON {type(raw).__name__} is no chat completion")
        choices = raw.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            said = raw.get("error")
            raise MalformedReply("it holds no choices[0].message" + (f", but the error {said}" if said else ""))
        text, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
        for name, value in (("content", text), ("refusal", refusal), ("finish_reason", finish)):
            if value is not None and not isinstance(value, str):
                raise MalformedReply(f"its {name} is a {type(value).__name__}, not a text")
        usage = raw.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        prompt, reply = (count if isinstance(count, int) and count > 0 else 0 for count in counts)
        return Reply(text or "", finish or "", refusal or "", prompt, reply, raw)


class Store(Journal):
    """The stored replies of a run by request key. Only one process at a time can open it.

    unreadable  number of lines that are not JSON, for example after a crash. They are ignored, so their requests are
                repeated.

    Raises EndpointError if the file cannot be opened or another process has it.
    """

    error = EndpointError

    def get(self, key: str) -> Reply | None:
        """Return the stored reply, or None."""
        entry = self.entry(key)
        return None if entry is None else Reply.read(entry["reply"])

    def keep(self, key: str, name: str, raw: dict[str, Any], secret: str = "") -> Reply:
        """Append a reply and return it. Every occurrence of `secret` (the API key) in it is replaced by ***.

        Raises MalformedReply, in which case nothing is stored, and EndpointError if it cannot be written.
        """
        self.append({"key": key, "name": name, "reply": raw}, secret)
        return Reply.read(json.loads(without(json.dumps(raw), secret)))

    def note_failure(self, key: str, name: str, why: str, secret: str = "") -> None:
        """Append the reason of a failed request. The next run repeats it."""
        self.append({"key": key, "name": name, "failed": why}, secret)

    def append(self, entry: dict[str, Any], secret: str = "") -> None:
        self.is_entry(entry)
        super().append(entry, secret)

    def is_entry(self, entry: Any) -> bool:
        """Return True for a reply and False for a failure. Raises MalformedReply."""
        super().is_entry(entry)
        if "failed" in entry:
            return False
        Reply.read(entry.get("reply"))
        return True


class Replies(Sequence["Reply | None"]):
    """The replies of a store in the order of their requests, read on access. None for a failed request."""

    def __init__(self, store: Store, keys: Sequence[str]) -> None:
        self._store, self._keys = store, keys

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, number: int) -> Reply | None: ...
    @overload
    def __getitem__(self, number: slice) -> Replies: ...
    def __getitem__(self, number: int | slice) -> Reply | Replies | None:
        keys = self._keys[number]
        return self._store.get(keys) if isinstance(keys, str) else Replies(self._store, keys)
