"""Checks that the results of two providers agree. Their times are compared only if the check passes.

In float32 the limit is 1e-4 relative, and greedy tokens must be equal except at a tie. In bfloat16 and float16 the
limits allow for a few rounding errors of the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RELATIVE_LIMIT = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-3}
TIE_LIMIT = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}
"""If the reference's two largest logits differ by less (relative to the largest magnitude), either token is correct."""


@dataclass(frozen=True)
class Check:
    """The result of a check: `value` must be at most `limit`. `detail` is additional text for the report."""

    name: str
    value: float
    limit: float
    passed: bool
    detail: str = ""

    @classmethod
    def at_most(cls, name: str, value: float, limit: float, detail: str = "") -> Check:
        return cls(name, float(value), float(limit), bool(value <= limit), detail)  # NaN fails


@dataclass(frozen=True)
class Greedy:
    """Greedy answers to compare: tokens [sequences][steps]. `gaps`, of the same shape, are the reference's differences
    between the largest and second logit, relative to the largest magnitude. `next_logits` [sequences, vocabulary]
    follow the last token (None if they were not kept)."""

    tokens: Sequence[Sequence[int]]
    gaps: Sequence[Sequence[float]] | None = None
    next_logits: Tensor | None = None


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    """Return max |got - wanted| / max |wanted|, or infinity for different shapes or non-finite values."""
    if got.shape != wanted.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def close(name: str, dtype: str):
    """Return a check of the relative difference of two tensors."""

    def check(got: Tensor, wanted: Tensor) -> Check:
        return Check.at_most(f"{name} relative difference", relative_difference(got, wanted), RELATIVE_LIMIT[dtype])

    return check


def equal_pixels(got: np.ndarray, wanted: np.ndarray) -> Check:
    """Check that tiles are bit-identical. The value is the largest difference of uint8 levels."""
    if got.shape != wanted.shape:
        return Check.at_most("tiles", float("inf"), 0, f"shapes {got.shape} and {wanted.shape}")
    return Check.at_most("tiles bit-equal", int(np.abs(got.astype(np.int16) - wanted).max()), 0)


def same_greedy(dtype: str):
    """Return a check of greedy answers. Tokens must be equal up to the reference's first tie. Without a tie, the logits
    after the last token must agree too."""

    def check(got: Greedy, wanted: Greedy) -> Check:
        wrong, ties, untied = 0, 0, []
        for number, (mine, theirs) in enumerate(zip(got.tokens, wanted.tokens, strict=True)):
            at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
            if at is None:
                untied.append(number)
            elif wanted.gaps[number][at] <= TIE_LIMIT[dtype]:
                ties += 1
            else:
                wrong += 1
        distinct = len({token for sequence in wanted.tokens for token in sequence})
        detail = f"{distinct} distinct tokens, {ties} answers part at a tie"
        if wrong or wanted.next_logits is None or not untied:
            return Check.at_most("answers with other greedy tokens", wrong, 0, detail)
        difference = relative_difference(got.next_logits[untied], wanted.next_logits[untied])
        name = "same greedy tokens; logits after them, relative difference"
        return Check.at_most(name, difference, RELATIVE_LIMIT[dtype], detail)

    return check


def same_training(dtype: str):
    """Return a check of {"loss": value, name: digest of a gradient} (see train_step.digest). Errors of a gradient are
    relative to its largest value, or to 1e-6 of the largest value of all gradients if that is larger."""

    def check(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Check:
        if got.keys() != wanted.keys():
            odd = sorted(got.keys() ^ wanted.keys())
            return Check.at_most("gradients present", float("inf"), 0, f"only one side has {', '.join(odd[:3])}")
        floor = 1e-6 * max(float(value.abs().max()) for name, value in wanted.items() if name != "loss")
        worst, where = -1.0, ""
        for name, value in wanted.items():
            largest = max(float(value.abs().max()), 0.0 if name == "loss" else floor)
            difference = float((got[name] - value).abs().max()) / largest
            if not difference <= worst:
                worst, where = difference, name
        limit = RELATIVE_LIMIT[dtype]
        return Check.at_most("loss and gradients, relative difference", worst, limit, f"largest in {where}")

    return check
