"""Literal text: no text of a user is interpreted as a control token, an image or a video.

Before a prompt is rendered, characters of its texts that could begin a control token are replaced by private-use
characters ("stand-ins"). All control tokens and placeholders in the rendered prompt are then the template's, however it
joins, trims or repeats the texts. Then the characters are restored. If the prompt now spells additional control tokens,
it is encoded by a copy of the tokenizer in which control tokens have other names of equal length, and the template's
control tokens are written with these names. The prompt is encoded once and as a whole, so that tokens merge across the
boundaries of a text as usual.

Limitations: if a template writes part of a control token and a text completes it, the token is still produced. A
template that searches a text for markup (for example to remove "<think>") finds none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from tokenizers import Tokenizer

from llava_fast.errors import RequestError

_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
STAND_INS = range(0xF0000, 0xFFFFE)  # private use, plane 15; only characters that the request's texts do not contain
NAMES = range(0x100000, 0x10FFFD)  # private use, plane 16: first characters of the control tokens' other names
FILLER = chr(0x10FFFD)


class Hidden:
    """The stand-ins of one request."""

    def __init__(self, characters: Sequence[str], texts: Sequence[str]) -> None:
        used = set("".join(texts))
        free = (chr(code) for code in STAND_INS if chr(code) not in used)
        self._there = {ord(character): next(free) for character in characters}
        self._back = {ord(stand_in): chr(code) for code, stand_in in self._there.items()}

    def hide(self, text: str) -> str:
        return text.translate(self._there)

    def restore(self, text: str) -> str:
        return text.translate(self._back)


class LiteralText:
    """The control tokens of a tokenizer: its special tokens, and added ones spelled <...> or [...]. `placeholders`
    are hidden as well. Raises RequestError for a tokenizer without a `tokenizers` backend."""

    def __init__(self, tokenizer: Any, placeholders: Sequence[str]) -> None:
        inner = getattr(tokenizer, "backend_tokenizer", None)
        if inner is None:
            raise RequestError(
                f"literal_text needs a tokenizer of the tokenizers library, not {type(tokenizer).__name__}"
            )
        added = inner.get_added_tokens_decoder()
        self.control = {
            token.content: number
            for number, token in added.items()
            if token.content.strip() and (token.special or _MARKUP.fullmatch(token.content))
        }
        if len(self.control) > len(NAMES):
            raise RequestError(f"literal_text supports {len(NAMES)} control tokens, and the tokenizer has more")
        self.characters = sorted({spelling.strip()[0] for spelling in (*self.control, *placeholders)})
        longest_first = sorted(self.control, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.names = {
            spelling: chr(NAMES[place]) + FILLER * (len(spelling) - 1) for place, spelling in enumerate(self.control)
        }
        self._reserved = re.compile(f"[{chr(NAMES[0])}-{FILLER}]")
        self._renamed = self._copy(inner)

    def hidden(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], Hidden]:
        """The request with stand-ins in its texts. Malformed parts are left unchanged."""
        hidden = Hidden(self.characters, list(texts_of(request)))
        changed = dict(request)
        if isinstance(request.get("prompt"), str):
            changed["prompt"] = hidden.hide(request["prompt"])
        if _is_list(request.get("messages")):
            changed["messages"] = [_with_text(message, "content", hidden) for message in request["messages"]]
        return changed, hidden

    def needs_names(self, rendered: str, restored: str) -> bool:
        """Whether the restored prompt spells control tokens that the template did not write."""
        before, after = self.pattern.finditer(rendered), self.pattern.finditer(restored)
        return [found.span() for found in before] != [found.span() for found in after]

    def encode(self, rendered: str, hidden: Hidden, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, character spans) of a prompt that contains stand-ins. Raises RequestError for a text with a character
        that is needed to name a control token.
        """
        restored = hidden.restore(rendered)
        if reserved := self._reserved.search(restored):
            raise RequestError(
                f"the text spells a control token and contains U+{ord(reserved[0]):X}, a private-use character that "
                "is needed to distinguish such texts from control tokens: leave that character out"
            )
        named = hidden.restore(self.pattern.sub(lambda found: self.names[found[0]], rendered))
        (encoded,) = self._renamed.encode_batch([named], add_special_tokens=special)  # `encode` holds the GIL
        return encoded.ids, encoded.offsets

    def _copy(self, inner: Tokenizer) -> Tokenizer:
        """The tokenizer with other names for its control tokens and the same ids. No other text gives these ids: the
        original names are removed from the vocabulary, and merges that would produce one are dropped.
        """
        state = json.loads(inner.to_str())
        names = self.names
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not self._makes_control(merge)]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        copy = Tokenizer.from_str(json.dumps(state))
        copy.no_truncation()
        copy.no_padding()
        for spelling, number in self.control.items():
            if copy.token_to_id(names[spelling]) != number:
                raise RequestError(
                    f"literal_text does not support this tokenizer: it does not find its own token {spelling!r}"
                )
        return copy

    def _makes_control(self, merge: str | Sequence[str]) -> bool:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        return not self.control.keys().isdisjoint((left, right, left + right))


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _with_text(part: Any, key: str, hidden: Hidden) -> Any:
    """A message (key "content") or an item of one (key "text") with stand-ins in its text."""
    if not isinstance(part, Mapping):
        return part
    value = part.get(key)
    if isinstance(value, str):
        return {**part, key: hidden.hide(value)}
    if key == "content" and _is_list(value):
        return {**part, key: [_with_text(item, "text", hidden) for item in value]}
    return part


def texts_of(request: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a request."""
    messages = request.get("messages")
    values: list[Any] = [request.get("prompt")]
    for message in messages if _is_list(messages) else []:
        content: Any = message.get("content") if isinstance(message, Mapping) else None
        values.extend(content if _is_list(content) else [content])
    for value in values:
        text = value.get("text") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            yield text
