"""One training step of a batch with labels: forward, loss, backward.

The vision tower is frozen and everything else is trained, as in LLaVA-1.5's second stage. Both sides have the same
rows and labels. The optimizer step, which is the same torch.optim code on both sides, is not included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import checks
from benchmarks.case import Case, Provider, Settings
from benchmarks.floors import train_floor
from benchmarks.inputs import ROTATED, describe, hf_inputs, requests, sizes
from benchmarks.subject import Subject
from llava_fast.families.llava_names import from_stored
from llava_fast.inputs.plan.plan import TextPiece
from llava_fast.models.batch import Batch

SAMPLED = 1 << 16
"""The number of evenly spaced values of each gradient that are compared, besides its root mean square and largest
magnitude. Complete gradients of both sides would not fit into the memory of a small machine."""


def cases(subject: Subject, settings: Settings) -> Iterator[Case]:
    wanted = answer(settings)
    ours = [our_batch(subject, settings, number, wanted) for number in range(ROTATED)]
    theirs = [hf_batch(subject, settings, number, wanted) for number in range(ROTATED)]

    def hf(model: nn.Module) -> Callable[[int], Tensor]:
        return lambda number: model.forward(**theirs[number % ROTATED], use_cache=False).loss

    makers = {
        "llava_fast": lambda: (subject.ours, lambda number: subject.ours(ours[number % ROTATED]).loss),
        "hf-eager": lambda: (subject.hf, hf(subject.hf)),
        "hf-compile": lambda: (subject.hf_compiled, hf(subject.hf_compiled)),
    }
    supervised = settings.batch_size * settings.answer_tokens
    yield Case(
        suite="train-step",
        model=subject.label,
        real_width=subject.real_width,
        label=f"{describe(settings, ours[0])}, {supervised} supervised",
        providers=[provider(name, *makers[name]()) for name in settings.backends],
        check=checks.same_training(settings.dtype),
        floor=train_floor(subject.config, sizes(ours[0], supervised), subject.dtype.itemsize),
        items=sum(ours[0].plan.lengths),
        unit="rows",
        weight_bytes=subject.weight_bytes,
    )


def digest(gradient: Tensor) -> Tensor:
    """Return float64 [at most SAMPLED + 2]: sampled values, root mean square and largest magnitude."""
    flat = gradient.reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLED)]
    whole = torch.stack([flat.double().square().mean().sqrt(), flat.abs().max().double()])
    return torch.cat([sample.double(), whole]).cpu()


def answer(settings: Settings) -> np.ndarray:
    """Return the token ids of the supervised rows."""
    return 4 + np.arange(settings.answer_tokens, dtype=np.int32) * 7 % 200


def provider(name: str, model: nn.Module, loss: Callable[[int], Tensor]) -> Provider:
    """A step of llava_fast's or transformers' `model`: `loss(i)`, then backward, with a frozen vision tower."""
    trained = {key: value for key, value in model.named_parameters() if "vision_tower." not in key}

    def prepare() -> None:
        model.requires_grad_(False)
        for value in trained.values():
            value.requires_grad_(True)

    def run(number: int) -> Tensor:
        value = loss(number)
        value.backward()
        return value.detach()

    def result(value: Tensor) -> dict[str, Tensor]:
        named = {from_stored(key) or key: value.grad for key, value in trained.items()}
        digests = {key: digest(gradient) for key, gradient in named.items() if gradient is not None}
        return {"loss": value.double().cpu()[None], **digests}

    def finish() -> None:
        for value in trained.values():
            value.grad = None  # frees the memory for the other side

    return Provider(name, run, result, prepare, finish, compiles=name == "hf-compile")


def our_batch(subject: Subject, settings: Settings, rotation: int, answer: np.ndarray) -> Batch:
    processor, tiles, sequences = subject.processor, [], []
    for request in requests(settings, rotation):
        *before, prompt = processor.outline(request)
        ids = np.concatenate([prompt.ids, answer])
        supervised = np.arange(len(ids)) >= len(prompt.ids)
        sequences.append(processor.pieces([*before, TextPiece(ids, supervised)], tiles))
    return Batch.from_prepared(processor.assemble(sequences, tiles), subject.device)


def hf_batch(subject: Subject, settings: Settings, rotation: int, answer: np.ndarray) -> dict[str, Tensor]:
    inputs = hf_inputs(subject, settings, rotation)
    answers = torch.from_numpy(answer).long().to(subject.device).expand(settings.batch_size, -1)
    ids = inputs["input_ids"]
    labels = torch.cat([torch.full_like(ids, -100), answers], 1)
    return inputs | {
        "input_ids": torch.cat([ids, answers], 1),
        "attention_mask": torch.ones_like(labels),
        "labels": labels,
    }
