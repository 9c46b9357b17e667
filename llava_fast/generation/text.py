"""Incremental detokenisation: never part of a character, never past a stop string."""

from __future__ import annotations

from typing import Any

MOST_PENDING = 32
"""Most tokens that wait for another token to complete their last character. A character has at most four bytes, so more
tokens wait only if they are not text, or if each completes one character and begins another."""


class TextDecoder:
    """Grows the text of one sequence as its tokens arrive.

    `push` returns the text that is now final: incomplete characters, and text that may be the start of a stop string,
    are held back. `stopped` is True after a stop string; neither it nor later text is ever returned. `text` is
    everything returned so far. If `pieces` is False and there is no stop string, push() returns "" and finish() returns
    everything, decoded once: only for callers that do not stream.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), pieces: bool = True) -> None:
        self.tokenizer = tokenizer
        self.pieces = pieces
        self.stop = tuple(s for s in stop if s)
        self._begun = [_Begun(s) for s in self.stop]
        self._seen = 0  # characters of `_decoded` already passed to `_begun`
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._done = 0  # ids whose text is in `_decoded`
        self._context = 0  # ids before this one no longer matter to decoding
        self._decoded = ""

    def push(self, token: int) -> str:
        self.ids.append(token)
        if not self.pieces and not self.stop:
            return ""
        before = self._decode(self.ids[self._context : self._done])
        both = self._decode(self.ids[self._context :])
        if both.endswith("\ufffd") and len(self.ids) - self._done < MOST_PENDING:
            return ""
        self._decoded += both[len(before) :]
        if both != before:  # after a context without text the next word would count as the first and lose its space
            self._context = self._done
        self._done = len(self.ids)
        return self._release(final=False)

    def finish(self) -> str:
        """The remaining text after the last token: whatever was held back, incomplete characters as U+FFFD."""
        if not self.stopped and self._done < len(self.ids):
            before = self._decode(self.ids[self._context : self._done])
            self._decoded += self._decode(self.ids[self._context :])[len(before) :]
            self._done = len(self.ids)
        return self._release(final=True)

    def _release(self, final: bool) -> str:
        if self.stopped:
            return ""
        start = len(self.text)
        found = [at for s in self.stop if (at := self._decoded.find(s, max(0, start - len(s)))) >= 0]
        if found:
            self.stopped = True
            end = max(min(found), start)
        else:
            end = len(self._decoded) - (0 if final else self._held_back())
        piece = self._decoded[start:end]
        self.text += piece
        return piece

    def _held_back(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string, none of which is in it."""
        new, self._seen = self._decoded[self._seen :], len(self._decoded)
        return max((begun.add(new) for begun in self._begun), default=0)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Begun:
    """The length of the stop string's prefix with which the text ends, updated as the text grows in linear time (Knuth,
    Morris and Pratt 1977)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.shorter = [0]  # for each prefix: its longest proper suffix that is a prefix too
        self.length = 0
        for character in stop[1:]:
            self.length = self._next(character)
            self.shorter.append(self.length)
        self.length = 0

    def add(self, text: str) -> int:
        for character in text:
            self.length = self._next(character)
        return self.length

    def _next(self, character: str) -> int:
        length = self.length
        while length and self.stop[length] != character:
            length = self.shorter[length - 1]
        return length + (self.stop[length] == character)
