"""The generation loop: prefill a batch, then one token a sequence a step, until each has ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llava_fast.generation.sampling import Sampler, Sampling
from llava_fast.generation.text import TextDecoder
from llava_fast.inputs.plan.columns import MODALITY_TEXT, TEXT
from llava_fast.models.attention import Spans
from llava_fast.models.batch import Batch
from llava_fast.models.kv_cache import KVCache
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
    the stop string out. `finish_reason` is "stop" (end token or stop string) or "length"."""

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    usage: Usage


class Sequence:
    """The host side of one sequence being generated: its sampler, its text, whether it has ended."""

    def __init__(self, sampler: Sampler, text: TextDecoder, end_ids: frozenset[int], limit: int) -> None:
        self.sampler = sampler
        self.text = text
        self.end_ids = end_ids
        self.limit = limit
        self.token_ids: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = "length" if limit == 0 else None

    def push(self, token: int) -> str:
        """Take the next token; returns the text it made certain and sets `finish_reason` at the end."""
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


def steps(
    model: LlavaModel, batch: Batch, sequences: list[Sequence], cache: KVCache
) -> Iterator[list[tuple[Sequence, str]]]:
    """Generate until every sequence has ended; yields, at each step, the sequences that moved and their new text.

    Sequence s writes to slot s of the cache, behind what that slot holds already. A sequence that ends gives its
    slot to the last one still running, so that a step costs only what runs.
    """
    slots = tuple(range(len(sequences)))
    spans = batch.spans(slots, tuple(cache.lengths[: len(slots)]))
    hidden = model.hidden_states(model.inputs_embeds(batch), batch, spans, cache)
    cache.advance(slots, spans.lengths)
    logits = model.decoder.logits(hidden[batch.column("last_row").long()])
    running = list(sequences)
    while True:
        moved = [
            (sequence, sequence.push(token))
            for sequence, token in zip(running, _choose(logits, running), strict=True)
            if sequence.limit
        ]
        yield moved
        for slot in reversed(range(len(running))):
            if running[slot].finish_reason is not None:
                cache.move(len(running) - 1, slot)
                running[slot] = running[-1]
                running.pop()
        if not running:
            return
        logits = decode_step(model, [sequence.token_ids[-1] for sequence in running], cache)


def decode_step(model: LlavaModel, tokens: list[int], cache: KVCache) -> Tensor:
    """Logits [sequences, vocabulary] after one more token for each of the first len(tokens) slots."""
    count = len(tokens)
    slots, before = tuple(range(count)), tuple(cache.lengths[:count])
    spans = Spans(slots, (1,) * count, slots, before)
    decoder = model.decoder
    token, position = torch.tensor([tokens, before], device=cache.keys[0].device)  # one transfer for both
    hidden = decoder(decoder.embed_tokens(token), position, spans, cache)
    cache.advance(slots, spans.lengths)
    return decoder.logits(hidden)


def _choose(logits: Tensor, running: list[Sequence]) -> list[int]:
    """The next token of each running sequence, by one transfer from the device for all."""
    if all(s.sampler.options.is_greedy for s in running):
        return logits.argmax(-1).tolist()
    return [sequence.sampler(row) for sequence, row in zip(running, logits.cpu(), strict=True)]


def new_sequence(
    model: LlavaModel,
    sampling: Sampling,
    prompt_ids: list[int],
    room: int,
    seed: int | None,
    pieces: bool = False,
) -> Sequence:
    """A sequence ready to run: `room` more rows fit its slot and `prompt_ids` count for the repetition penalty. With
    `pieces`, each step returns the text that it made certain; without, a caller gets all text at the end."""
    stop, end_ids = sampling.stop, frozenset()
    if not sampling.ignore_eos:
        stop, end_ids = stop + model.processor.template.stop, frozenset(model.config.eos_token_ids)
    # Special tokens leave no text behind, so a stop string that is one is met as a token.
    special = {s: token for s in stop if (token := _special_id(model.tokenizer, s)) is not None}
    return Sequence(
        Sampler(sampling, seed, prompt_ids),
        TextDecoder(model.tokenizer, tuple(s for s in stop if s not in special), pieces),
        end_ids | set(special.values()),
        max(0, min(sampling.max_new_tokens, room)),
    )


def _special_id(tokenizer: Any, text: str) -> int | None:
    """The id of the special token spelt `text`; None where `text` is ordinary."""
    token = tokenizer.convert_tokens_to_ids(text)
    if token is None or tokenizer.convert_ids_to_tokens(token) != text:
        return None
    return None if tokenizer.decode([token], skip_special_tokens=True) else token


def prompt_ids(batch: Batch, sequence: int, image_token_id: int) -> list[int]:
    """The token ids of one sequence's prompt that a repetition penalty counts: its text and, as in transformers,
    the image placeholder where there are visual rows."""
    plan = batch.plan
    mine = (plan.column("sequence") == sequence) & (plan.column("source") == TEXT)
    placeholder = [image_token_id] if visual_tokens(batch, sequence) else []
    return plan.column("row")[mine].tolist() + placeholder


def visual_tokens(batch: Batch, sequence: int) -> int:
    plan = batch.plan
    return int(((plan.column("sequence") == sequence) & (plan.column("modality") > MODALITY_TEXT)).sum())
