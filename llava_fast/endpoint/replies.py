"""Replies, and the file that keeps every one of them as it came: JSON lines, only ever appended to.

A line is {"key", "name", "reply"}, the reply being the endpoint's own JSON, or {"key", "name", "failed"} with the
reason why a request was given up. A killed process leaves at most the last line torn, which the next opening cuts
off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, overload

from filelock import FileLock, Timeout

from llava_fast.errors import EndpointError


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


class Store:
    """The kept replies of a run, by key. One process at a time has it open.

    unreadable  lines that are no JSON, as a machine's crash may leave; they are ignored, so their requests are asked
                again.

    Raises EndpointError if the file cannot be opened or another process has it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.unreadable = 0
        self._places: dict[str, tuple[int, int]] = {}
        self._lock = FileLock(f"{self.path}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise EndpointError(f"another process keeps replies in {self.path}: wait for it, or end it") from None
        except OSError as error:
            raise EndpointError(f"{self.path} cannot be opened: {error.strerror or error}") from None
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            self._lock.release()
            raise EndpointError(f"{self.path} cannot be opened: {error.strerror or error}") from None
        self._end = self._read()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1
            self._lock.release()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def get(self, key: str) -> Reply | None:
        """The kept reply, or None."""
        if key not in self._places:
            return None
        at, length = self._places[key]
        return Reply.read(json.loads(os.pread(self._file, length, at))["reply"])

    def keep(self, key: str, name: str, raw: dict[str, Any], secret: str = "") -> Reply:
        """Append a reply and return it. Every occurrence of `secret` (the API key) in it is replaced by ***.

        Raises MalformedReply, and then keeps nothing; EndpointError if it cannot be written.
        """
        Reply.read(raw)
        at, line = self._append({"key": key, "name": name, "reply": raw}, secret)
        self._places[key] = (at, len(line))
        return Reply.read(json.loads(line)["reply"])

    def note_failure(self, key: str, name: str, why: str, secret: str = "") -> None:
        """Append why a request has no reply. It will be asked again."""
        self._append({"key": key, "name": name, "failed": why}, secret)

    def _append(self, line: dict[str, Any], secret: str) -> tuple[int, bytes]:
        text = json.dumps(line)  # ASCII: half a surrogate pair is kept too
        data = without(text, secret).encode() + b"\n"
        at, left = self._end, data
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            os.ftruncate(self._file, at)
            raise EndpointError(f"{self.path} cannot be written: {error.strerror or error}") from None
        self._end += len(data)
        return at, data

    def _read(self) -> int:
        """Index the lines, cut off a torn last one, and return the file's length."""
        at = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, at)
                    break
                self._note_line(line, at)
                at += len(line)
        return at

    def _note_line(self, line: bytes, at: int) -> None:
        try:
            value = json.loads(line)
            if "reply" in value:
                Reply.read(value["reply"])
                self._places[str(value["key"])] = (at, len(line))
            elif "failed" not in value:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):  # MalformedReply and JSON's errors are ValueErrors
            self.unreadable += 1


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


def without(text: str, secret: str) -> str:
    """`text` with *** in place of the API key, which an endpoint may echo."""
    return text.replace(secret, "***") if len(secret) >= 8 else text
