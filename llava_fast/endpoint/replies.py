"""Replies, and the file that keeps every one of them as it came.

A line is {"key", "name", "reply"}, the reply being the endpoint's own JSON, or {"key", "name", "failed"} with the
reason why a request was given up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from llava_fast.errors import EndpointError
from llava_fast.storage.journal import Journal, without


class MalformedReply(ValueError):
    """What came is not a chat completion; the message says in what."""


@dataclass(frozen=True)
class Reply:
    """A chat completion.

    text     what the model said; "" if it said nothing.
    finish   why it ended: stop, length, content_filter, ...
    refusal  the refusal that some endpoints give in place of a text.
    prompt_tokens, reply_tokens   as the endpoint counted them; 0 if it did not.
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
        """Whether it is a text that ended by itself."""
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
    """The kept replies of a run, by the key of their request. One process at a time has it open.

    unreadable  lines that are no JSON, as a machine's crash may leave; they are ignored, so their requests are asked
                again.

    Raises EndpointError if the file cannot be opened or another process has it.
    """

    error = EndpointError

    def get(self, key: str) -> Reply | None:
        """The kept reply, or None."""
        entry = self.entry(key)
        return None if entry is None else Reply.read(entry["reply"])

    def keep(self, key: str, name: str, raw: dict[str, Any], secret: str = "") -> Reply:
        """Append a reply and return it. Every occurrence of `secret` (the API key) in it is replaced by ***.

        Raises MalformedReply, and then keeps nothing; EndpointError if it cannot be written.
        """
        self.append({"key": key, "name": name, "reply": raw}, secret)
        return Reply.read(json.loads(without(json.dumps(raw), secret)))

    def note_failure(self, key: str, name: str, why: str, secret: str = "") -> None:
        """Append why a request has no reply. It will be asked again."""
        self.append({"key": key, "name": name, "failed": why}, secret)

    def append(self, entry: dict[str, Any], secret: str = "") -> None:
        self.is_entry(entry)
        super().append(entry, secret)

    def is_entry(self, entry: Any) -> bool:
        """Whether it is a reply; False for a failure. Raises MalformedReply."""
        super().is_entry(entry)
        if "failed" in entry:
            return False
        Reply.read(entry.get("reply"))
        return True


class Replies(Sequence["Reply | None"]):
    """Replies of a store in the order of their requests, read when they are looked at; None where one has failed."""

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
