"""Choosing the next token: penalties, temperature, top-k, top-p and a draw that depends on the request alone.

Sources: Holtzman et al. 2020 (top-p); Fan et al. 2018 (top-k); Keskar et al. 2019 (repetition penalty). The order
(penalty, temperature, top-k, top-p) is transformers'.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from numbers import Integral, Real

import torch
from torch import Tensor

from llava_fast.errors import RequestError


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 is greedy; top_p 1 and top_k 0 are off; repetition_penalty 1 is off."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, Real) and 0 <= self.temperature < inf):
            raise RequestError(f"temperature must be 0 (greedy) or more, got {self.temperature!r}")
        if not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise RequestError(f"top_p must be above 0 and at most 1 (off), got {self.top_p!r}")
        if not (isinstance(self.top_k, Integral) and self.top_k >= 0):
            raise RequestError(f"top_k must be 0 (off) or a positive whole number, got {self.top_k!r}")
        if not (isinstance(self.repetition_penalty, Real) and 0 < self.repetition_penalty < inf):
            raise RequestError(f"repetition_penalty must be above 0 (1 is off), got {self.repetition_penalty!r}")


class Sampler:
    """Draws tokens for one sequence. Each has its own generator, seeded by the request, so that a draw does not
    depend on the sequence's place in the batch or on its neighbours."""

    def __init__(self, options: SamplingOptions, seed: int | None, seen: list[int]) -> None:
        self.options = options
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(int(seed))
        self.seen = set(seen)

    def __call__(self, logits: Tensor) -> int:
        """The next token id from logits [vocabulary]."""
        options = self.options
        logits = logits.float()
        if options.repetition_penalty != 1.0:
            logits = penalise(logits, self.seen, options.repetition_penalty)
        if options.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = filtered_probabilities(logits.cpu(), options)
            token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        self.seen.add(token)
        return token


def penalise(logits: Tensor, seen: set[int], penalty: float) -> Tensor:
    """Logits of tokens already seen are divided by the penalty where positive, multiplied where negative."""
    index = torch.tensor(sorted(token for token in seen if 0 <= token < len(logits)), device=logits.device)
    if not len(index):
        return logits
    chosen = logits[index]
    return logits.index_copy(0, index, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def filtered_probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """float32 probabilities [vocabulary] after temperature, top-k and top-p; at least one token survives."""
    logits = (logits - logits.max()) / options.temperature  # from the top, so that no small temperature overflows
    if options.top_k:
        kth = logits.topk(min(options.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if options.top_p < 1:
        ordered, index = logits.sort()
        tail = ordered.softmax(0).cumsum(0) <= 1 - options.top_p
        tail[-1] = False
        logits = logits.masked_fill(torch.zeros_like(tail).scatter(0, index, tail), -torch.inf)
    return logits.softmax(0)
