"""One answer in progress: its prompt, its sampler, its text so far, the table of its cached rows."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from llava_fast.generation.grammar import GrammarMask
from llava_fast.generation.prompt import Part, Prompt
from llava_fast.generation.sampling import LogitsProcessor, Sampler, Sampling, TokenLogprob
from llava_fast.generation.text import TextDecoder
from llava_fast.inputs.plan.plan import TextPiece
from llava_fast.models.paged_cache import BlockTable
from llava_fast.models.vlm import LlavaModel


@dataclass(frozen=True)
class Usage:
    """Tokens of one request: the prompt's (visual ones included), the visual ones alone, the answer's."""

    prompt_tokens: int
    visual_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Generation:
    """One answer. `token_ids` holds every token generated, an end token included; `text` leaves special tokens and
    the stop string out. `finish_reason` is "stop" (end token or stop string) or "length". `logprobs` has an item for
    each token, if they were asked for."""

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    logprobs: list[TokenLogprob] | None = None


class Sequence:
    """One prompt and its answer, on the host.

    finish_reason  None while it runs; then "stop", "length", "cancelled" or "error" (see `error`).
    table          the block table of its cached rows, or None.
    cached_rows    rows found in the cache at its last admission; `admission` counts admissions.
    reused_rows    rows found in the cache at its first admission, when none was its own; None before.
    ahead          steps that were launched for it and whose tokens the host has not seen; `slot` is its place on the
                   device for them (device_sampling).
    """

    def __init__(
        self, prompt: Prompt, sampler: Sampler, text: TextDecoder, end_ids: frozenset[int], limit: int
    ) -> None:
        self.prompt = prompt
        self.sampler = sampler
        self.text = text
        self.end_ids = end_ids
        self.limit = limit
        self.token_ids: list[int] = []
        self.finish_reason: Literal["stop", "length", "cancelled", "error"] | None = "length" if limit == 0 else None
        self.error: Exception | None = None
        self.table: BlockTable | None = None
        self.cached_rows = self.admission = self.ahead = 0
        self.reused_rows: int | None = None
        self.slot: int | None = None
        self.embedded: tuple[int, Tensor] | None = None  # first row, embeddings that wait for their prefill pass

    @property
    def rows(self) -> int:
        """Rows that must be cached before the next token can be chosen."""
        return self.prompt.rows + len(self.token_ids)

    @property
    def cached(self) -> BlockTable:
        """`table` of a running sequence."""
        assert self.table is not None
        return self.table

    @property
    def keys(self) -> list[int]:
        """The keys of all rows (see prompt.Part)."""
        return self.prompt.keys + self.token_ids

    def between(self, first: int, last: int) -> tuple[list[Part], int]:
        """The parts of rows [first, last), as Prompt.between; rows after the prompt are the answer's tokens."""
        parts, begin = self.prompt.between(first, last)
        rows = self.prompt.rows
        if last > rows:
            parts.append(Part(TextPiece(np.asarray(self.token_ids[max(first - rows, 0) : last - rows], np.int32))))
        return parts, begin

    def push(self, token: int) -> str:
        """Append the next token; returns the new final text and sets `finish_reason` at the end."""
        self.token_ids.append(token)
        if token in self.end_ids:
            self.finish_reason = "stop"
            return self.text.finish()
        piece = self.text.push(token)
        if self.text.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
            piece += self.text.finish()
        return piece

    def result(self) -> Generation:
        """The answer. Raises the sequence's error if it has failed."""
        if self.error is not None:
            raise self.error
        reason: Literal["stop", "length"] = "stop" if self.finish_reason == "stop" else "length"
        usage = Usage(self.prompt.encoded_rows or self.prompt.rows, self.prompt.visual_rows, len(self.token_ids))
        logprobs = None if self.sampler.options.logprobs is None else self.sampler.logprobs
        return Generation(self.text.text, self.token_ids, reason, usage, logprobs)


def new_sequence(
    model: LlavaModel,
    prompt: Prompt,
    sampling: Sampling,
    seed: int | None = None,
    pieces: bool = False,
    processors: SequenceOf[LogitsProcessor] = (),
) -> Sequence:
    """A sequence ready to run. With `pieces`, each step returns its new final text; without, all text is returned at
    the end. `seed` and `processors`: as for Sampler.
    """
    stop: tuple[str, ...] = tuple(sampling.stop or ())
    end_ids: frozenset[int] = frozenset()
    if not sampling.ignore_eos:
        stop, end_ids = stop + model.own_processor.template.stop, frozenset(model.config.eos_token_ids)
    # Special tokens decode to no text, so stop strings that are special tokens are matched as tokens.
    special = {s: token for s in stop if (token := _special_id(model.tokenizer, s)) is not None}
    room = model.config.decoder.context_length - prompt.rows
    last: list[LogitsProcessor] = []
    if sampling.grammar is not None:
        # Only the model's stop tokens, since an llguidance tokenizer is cached for each set.
        own = {token for s in model.own_processor.template.stop if (token := special.get(s)) is not None}
        ends = sorted(end_ids | own)
        last.append(GrammarMask(sampling.grammar, model.tokenizer, model.config.decoder.vocab_size, ends))
    seen = prompt.ids(model.config.image_token_id) if sampling.repetition_penalty != 1 else []
    return Sequence(
        prompt,
        Sampler(sampling, seed, seen, [*processors, *last]),
        TextDecoder(model.tokenizer, tuple(s for s in stop if s not in special), pieces),
        end_ids | set(special.values()),
        max(0, min(sampling.max_new_tokens, room)),
    )


def _special_id(tokenizer: Any, text: str) -> int | None:
    """The id of the special token `text`; None if `text` is not a special token."""
    token = tokenizer.convert_tokens_to_ids(text)
    if token is None or tokenizer.convert_ids_to_tokens(token) != text:
        return None
    return None if tokenizer.decode([token], skip_special_tokens=True) else token
