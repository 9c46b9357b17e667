"""Comparisons with transformers: the relative error, and the largest one, which the test run prints at its end."""

from __future__ import annotations

import torch
from torch import Tensor

WORST: dict[str, float] = {}
TIES = {"tokens": 0, "ties": 0}


def relative(found: Tensor, expected: Tensor) -> float:
    """max|a-b| / max|b|."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not found.numel():
        return 0.0
    assert found.isfinite().all()
    assert expected.isfinite().all()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_close(what: str, found: Tensor, expected: Tensor, limit: float = 1e-4) -> None:
    error = relative(found, expected)
    WORST[what] = max(WORST.get(what, 0.0), error)
    assert error <= limit, f"{what}: relative error {error:.2e}"


def forget_rope(hf) -> None:
    """Dynamic RoPE in transformers remembers the longest sequence of earlier calls; start as a fresh model does."""
    whole = hf.model if hasattr(hf, "model") else hf.language_model
    named = (getattr(whole, name, None) for name in ("language_model", "text_model", "model"))
    decoder = next((part for part in named if part is not None), None)
    rotary = getattr(decoder, "rotary_emb", None)  # OPT has learned positions
    if getattr(rotary, "rope_type", None) == "dynamic":
        rotary.inv_freq = rotary.original_inv_freq
        rotary.max_seq_len_cached = rotary.original_max_seq_len


@torch.no_grad()
def reference_logits(hf, inputs: dict) -> Tensor:
    """[rows, vocabulary] of one prompt."""
    forget_rope(hf)
    return hf(**inputs).logits[0]


@torch.no_grad()
def reference_greedy(hf, inputs: dict, tokens: int = 32) -> tuple[list[int], Tensor]:
    """transformers' own greedy answer and the logits of each of its steps [tokens, vocabulary]."""
    forget_rope(hf)
    out = hf.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, -len(out.logits) :].tolist(), torch.stack(out.logits)[:, 0]


def all_logits(model, batch) -> list[Tensor]:
    """The logits of each sequence of a batch [rows, vocabulary], without the rows that an encoder reads."""
    out, plan = model(batch, logits="all").logits, batch.plan
    each = out if plan.layout == "padded" else out.split(plan.lengths)
    encoded = plan.encoded or (0,) * len(plan.lengths)
    return [rows[first:length] for rows, first, length in zip(each, encoded, plan.lengths, strict=True)]


def assert_same_answer(found: list[int], expected: list[int], logits: Tensor) -> None:
    """Equal tokens, except that a step whose two best logits differ by less than 1e-5 of the largest may go either
    way; such ties are counted, and may be 1% of all tokens (checked where the run ends)."""
    TIES["tokens"] += len(expected)
    if found == expected:
        return
    assert len(found) == len(expected)
    step = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    best, second = logits[step].topk(2).values.tolist()
    gap = (best - second) / logits[step].abs().max().item()
    assert gap < 1e-5, f"token {step} is {found[step]}, not {expected[step]}, and its lead is {gap:.1e}"
    TIES["ties"] += 1
    assert TIES["ties"] <= max(1, 0.01 * TIES["tokens"])
