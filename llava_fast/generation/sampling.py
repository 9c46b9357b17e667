"""Sampling the next token: penalties, temperature, top-k, top-p, min-p and a draw that depends only on the request.

Draws use inverse transform sampling: from the probabilities (float32, in the vocabulary's order) and a number in [0, 1)
that depends only on the request's seed and the token's index (`uniform`), so the device (device_sampling) and the host
draw the same token without sharing a generator.

Sources: Holtzman et al. 2020 (top-p); Fan et al. 2018 (top-k); Nguyen et al. 2024 (min-p); Keskar et al. 2019
(repetition penalty); Steele et al. 2014 (SplitMix64). The order (penalty, temperature, top-k, top-p, min-p) is
transformers'.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf, isfinite, log
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import Tensor

from llava_fast.errors import GenerationError, RequestError
from llava_fast.generation.grammar import Grammar


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is generated; every field may also be given to generate, stream and send as a keyword.

    max_new_tokens     the most tokens an answer may have (default 128; the context may end it earlier).
    temperature        0 (default) takes the likeliest token; above 0 draws.
    top_p, top_k       keep the likeliest tokens of total probability top_p, or the top_k likeliest (1 and 0: off).
    min_p              keeps tokens that are at least min_p times as likely as the likeliest (0: off).
    repetition_penalty above 1 makes tokens of the prompt and the answer less likely again (1: off).
    presence_penalty   subtracted from the logit of every token that occurs in the answer (0: off).
    frequency_penalty  the same, times the token's count in the answer (0: off).
    logit_bias         {token id: what is added to its logit}.
    logprobs           return each token's log probability, and those of this many likeliest tokens (None: off),
                       computed before penalties, bias, grammar and temperature.
    grammar            constrains the answer (see generation.grammar.Grammar).
    stop               a string or several that end the answer; they are not part of it.
    seed               makes draws reproducible; request i of a batch uses seed + i. A request's "seed" wins.
    ignore_eos         continue after end tokens (for benchmarks).

    Raises RequestError for a value out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None
    stop: str | Sequence[str] | None = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, Integral) or self.max_new_tokens < 0:
            raise RequestError(f"max_new_tokens must be a whole number, 0 or more, got {self.max_new_tokens!r}")
        if not (isinstance(self.temperature, Real) and 0 <= self.temperature < inf):
            raise RequestError(f"temperature must be 0 (greedy) or more, got {self.temperature!r}")
        if not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise RequestError(f"top_p must be above 0 and at most 1 (off), got {self.top_p!r}")
        if not (isinstance(self.top_k, Integral) and self.top_k >= 0):
            raise RequestError(f"top_k must be 0 (off) or a positive whole number, got {self.top_k!r}")
        if not (isinstance(self.repetition_penalty, Real) and 0 < self.repetition_penalty < inf):
            raise RequestError(f"repetition_penalty must be above 0 (1 is off), got {self.repetition_penalty!r}")
        if not (isinstance(self.min_p, Real) and 0 <= self.min_p <= 1):
            raise RequestError(f"min_p must be from 0 (off) to 1, got {self.min_p!r}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not (isinstance(getattr(self, name), Real) and isfinite(getattr(self, name))):
                raise RequestError(f"{name} must be a number, got {getattr(self, name)!r}")
        for token, bias in (self.logit_bias or {}).items():
            if not (isinstance(token, Integral) and token >= 0 and isinstance(bias, Real) and isfinite(bias)):
                raise RequestError(f"logit_bias must map token ids to numbers, got {token!r}: {bias!r}")
        if self.logprobs is not None and not (isinstance(self.logprobs, Integral) and self.logprobs >= 0):
            raise RequestError(f"logprobs must be a whole number, 0 or more, or None, got {self.logprobs!r}")
        if not isinstance(self.grammar, (Grammar, type(None))):
            raise RequestError(f"grammar must be a Grammar, got {self.grammar!r}")
        if self.grammar is not None and self.ignore_eos:
            raise RequestError("ignore_eos and grammar contradict each other: a grammar decides where an answer ends")
        if self.seed is not None and not (isinstance(self.seed, Integral) and 0 <= self.seed < 2**63):
            raise RequestError(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r}")
        several = isinstance(self.stop, (list, tuple, set, frozenset, type(None)))
        stop = tuple(self.stop or ()) if several else (self.stop,)
        if not all(isinstance(s, str) and s for s in stop):
            raise RequestError(f"stop must be a string or several, none of them empty, got {self.stop!r}")
        object.__setattr__(self, "stop", stop)

    @classmethod
    def of(cls, sampling: Sampling | None, **changes: Any) -> Sampling:
        """`sampling` (default: all defaults) with some fields replaced. Raises RequestError, also for a field that
        does not exist."""
        if not isinstance(sampling, (cls, type(None))):
            raise RequestError(f"sampling must be a llava_fast.Sampling, got {sampling!r}: give options by keyword")
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in changes if name not in names]:
            raise RequestError(f"unknown option {unknown[0]!r}: the options are {', '.join(names)}")
        return replace(sampling or cls(), **changes)


class LogitsProcessor(Protocol):
    """Changes a sequence's logits before a token is chosen: a penalty, a bias, a grammar's mask."""

    def __call__(self, logits: Tensor, token_ids: list[int]) -> Tensor:
        """New logits, float32 [vocabulary], from the given ones and the answer so far. An error ends the sequence."""


class RepetitionPenalty:
    """Makes tokens of the prompt (`seen`) and of the answer less likely."""

    def __init__(self, seen: Iterable[int], penalty: float) -> None:
        self.seen = set(seen)
        self.penalty = penalty

    def __call__(self, logits: Tensor, token_ids: list[int]) -> Tensor:
        return penalise(logits, self.seen.union(token_ids), self.penalty)


class AnswerPenalty:
    """Makes tokens that occur in the answer less likely, by OpenAI's presence and frequency penalties."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = presence, frequency

    def __call__(self, logits: Tensor, token_ids: list[int]) -> Tensor:
        counts = torch.bincount(torch.tensor(token_ids, dtype=torch.long), minlength=len(logits)).to(logits)
        return logits - self.frequency * counts - self.presence * (counts > 0)


class Bias:
    """Adds to the logits of some tokens. Raises RequestError at the first call for a token id outside the
    vocabulary.
    """

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.tokens = torch.tensor(list(bias), dtype=torch.long)
        self.added = torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, logits: Tensor, token_ids: list[int]) -> Tensor:
        if len(self.tokens) and int(self.tokens.max()) >= len(logits):
            raise RequestError(f"logit_bias names the token {int(self.tokens.max())}, and there are {len(logits)}")
        return logits.index_add(0, self.tokens.to(logits.device), self.added.to(logits.device))


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability, and those of the likeliest tokens at its position, in descending order."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Sampler:
    """Draws tokens for one sequence. A draw depends on the request's seed and the token's index, not on the sequence's
    place in the batch or on its neighbours.

    seen        token ids of the prompt, for the repetition penalty.
    processors  run in order, after penalties and bias and before temperature, top-k, top-p and min-p.
    is_greedy   whether each token is the argmax of unmodified logits and no log probabilities are requested.
    on_device   whether device_sampling can choose the tokens too: no log probabilities, and nothing but a repetition
                penalty changes the logits.
    """

    def __init__(
        self, options: Sampling, seed: int | None, seen: Iterable[int], processors: Sequence[LogitsProcessor] = ()
    ) -> None:
        self.options = options
        self.seed = secrets.randbits(63) if seed is None else int(seed)
        self.seen = frozenset(seen)
        self.drawn: list[int] = []
        self.logprobs: list[TokenLogprob] = []  # if requested
        self.processors: list[LogitsProcessor] = []
        if options.repetition_penalty != 1.0:
            self.processors.append(RepetitionPenalty(self.seen, options.repetition_penalty))
        if options.presence_penalty or options.frequency_penalty:
            self.processors.append(AnswerPenalty(options.presence_penalty, options.frequency_penalty))
        if options.logit_bias:
            self.processors.append(Bias(options.logit_bias))
        self.processors += processors
        self.is_greedy = options.temperature == 0 and not self.processors and options.logprobs is None
        penalties = all(isinstance(each, RepetitionPenalty) for each in self.processors)
        self.on_device = penalties and options.logprobs is None

    def __call__(self, logits: Tensor) -> int:
        """The next token id, from logits [vocabulary]. Raises GenerationError for NaN logits."""
        logits = own = logits.float()
        for processor in self.processors:
            logits = processor(logits, self.drawn)
        if logits.isnan().any().item():
            raise not_a_number(len(self.drawn))
        if self.options.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = filtered_probabilities(logits.cpu(), self.options)
            if probabilities.isnan().any().item():  # from infinite logits
                raise not_a_number(len(self.drawn))
            token = int(drawn(probabilities, uniform(self.seed, len(self.drawn))))
        self.drawn.append(token)
        if self.options.logprobs is not None:
            self.logprobs.append(token_logprob(own, token, self.options.logprobs))
        return token


def greedy_tokens(logits: Tensor) -> list[int]:
    """The likeliest token of each row of [sequences, vocabulary], -1 for a row that holds a NaN: one transfer."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        rows = logits.detach().numpy()  # numpy's argmax is 20 times as fast as torch's on a CPU
        best = rows.argmax(-1).tolist()
        values = map(rows.item, range(len(best)), best)  # Python floats: numpy scalars cost a microsecond each
        return [token if value == value else -1 for token, value in zip(best, values, strict=True)]
    best = logits.argmax(-1, keepdim=True)  # a NaN counts as the largest
    return torch.where(logits.gather(-1, best).isnan(), -1, best).flatten().tolist()


def token_logprob(logits: Tensor, token: int, most: int) -> TokenLogprob:
    """The token's log probability, and the `most` likeliest tokens, from float32 logits [vocabulary]."""
    every = logits.log_softmax(0)
    best = every.topk(min(most, len(every)))
    return TokenLogprob(token, every[token].item(), list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


def not_a_number(tokens: int) -> GenerationError:
    return GenerationError(
        f"the model's logits are not numbers at token {tokens + 1} of the answer: check its weights, or load "
        "it in a wider dtype"
    )


def penalise(logits: Tensor, seen: set[int], penalty: float) -> Tensor:
    """Logits of tokens already seen are divided by the penalty where positive, multiplied where negative."""
    index = torch.tensor(sorted(token for token in seen if 0 <= token < len(logits)), device=logits.device)
    if not len(index):
        return logits
    chosen = logits[index]
    return logits.index_copy(0, index, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def uniform(seed: int, number: int) -> float:
    """The number in [0, 1) by which token `number` of an answer is drawn: 52 bits of SplitMix64, whose state starts
    from the mixed seed."""
    return (_mixed(_mixed(seed + _STEP) + (number + 1) * _STEP) >> 12) * 2.0**-52


_STEP, _WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1


def _mixed(z: int) -> int:
    z &= _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


def drawn(probabilities: Tensor, number: Tensor | float) -> Tensor:
    """The tokens [...] at which the running sums of probabilities [..., vocabulary], in float64, first exceed `number`
    ([..., 1] or one for all, in [0, 1)) times their total."""
    reached = probabilities.double().cumsum(-1)
    return (reached <= number * reached[..., -1:]).sum(-1)


COLDEST = 1e-30  # lower temperatures give the same draws, but would underflow in float32


def filtered_probabilities(logits: Tensor, options: Sampling) -> Tensor:
    """float32 probabilities [vocabulary] after temperature, top-k, top-p and min-p; at least one token survives."""
    logits = (logits - logits.max()) / max(options.temperature, COLDEST)  # cannot overflow
    if options.top_k:
        kth = logits.topk(min(options.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if options.top_p < 1:
        ordered, index = logits.sort(stable=True)
        tail = ordered.softmax(0).cumsum(0) <= 1 - options.top_p
        tail[-1] = False
        logits = logits.masked_fill(torch.zeros_like(tail).scatter(0, index, tail), -torch.inf)
    if options.min_p:
        logits = logits.masked_fill(logits < logits.max() + log(options.min_p), -torch.inf)
    return logits.softmax(0)
