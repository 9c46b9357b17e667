"""Constrained decoding: JSON, a JSON schema or a regular expression, by llguidance's token masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from llava_fast.errors import GenerationError, MissingPackageError, RequestError


@dataclass(frozen=True)
class Grammar:
    """What an answer must match: `Grammar.json()` any JSON object, `Grammar.json_schema(schema)`,
    `Grammar.regex(pattern)` (Rust's syntax; the whole answer matches).
    """

    kind: Literal["json_schema", "regex"]
    text: str

    @classmethod
    def json(cls) -> Grammar:
        return cls("json_schema", '{"type":"object"}')

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | bool) -> Grammar:
        """Raises RequestError for a schema that is not JSON."""
        try:
            return cls("json_schema", json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema is not valid JSON: {error}") from None

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        return cls("regex", pattern)


class GrammarMask:
    """A logits processor that allows only tokens after which the answer can still match the grammar, and `end_ids`
    where it may end. Raises RequestError for a grammar that cannot be used, MissingPackageError without llguidance.
    """

    def __init__(self, grammar: Grammar, tokenizer: Any, vocabulary: int, end_ids: Sequence[int]) -> None:
        guide = _llguidance()
        try:
            matcher = guide.LLMatcher
            make = matcher.grammar_from_regex if grammar.kind == "regex" else matcher.grammar_from_json_schema
            self.matcher = matcher(
                llguidance_tokenizer(tokenizer, vocabulary, end_ids), make(grammar.text), log_level=0
            )
            wrong = self.matcher.get_error()
        except ValueError as error:
            wrong = str(error)
        if wrong:
            name = "regular expression" if grammar.kind == "regex" else "JSON schema"
            raise RequestError(f"the {name} cannot be used: {' '.join(wrong.split())[:500]}")
        self._consumed = 0
        self._mask = np.zeros(-(-vocabulary // 32), np.int32)

    def __call__(self, logits: Tensor, token_ids: list[int]) -> Tensor:
        for token in token_ids[self._consumed :]:
            self.matcher.consume_token(token)
        self._consumed = len(token_ids)
        self.matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self.matcher.is_error():
            raise GenerationError(f"the answer's grammar failed: {' '.join(self.matcher.get_error().split())[:500]}")
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: len(logits)].astype(bool)
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)


_tokenizers: WeakKeyDictionary[Any, dict[tuple, Any]] = WeakKeyDictionary()


def llguidance_tokenizer(tokenizer: Any, vocabulary: int, end_ids: Sequence[int]) -> Any:
    """The tokenizer in llguidance's format, built once (in a second for a large vocabulary). Raises RequestError."""
    made = _tokenizers.setdefault(tokenizer, {})
    key = (vocabulary, tuple(end_ids))
    if key not in made:
        try:
            from llguidance.hf import from_tokenizer

            made[key] = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(end_ids))
        except ValueError as error:
            raise RequestError(f"llguidance cannot read this tokenizer: {error}") from error
    return made[key]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingPackageError("an answer's grammar", "llguidance", "serve") from error
    return llguidance
