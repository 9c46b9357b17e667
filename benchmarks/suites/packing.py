"""Forward and backward passes over samples of mixed lengths: packed, or padded to the longest of each micro-batch.

Both are layouts of llava_fast's trainer with the same samples, loss and gradients. "llava_fast" is `data.batching:
packed`. "padded" forms micro-batches in the order of the samples, as with a shuffled data set. Micro-batches of both
have the same limit on rows. The tower is frozen and the rest is trained. The optimizer step is not included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks import checks
from benchmarks.case import Case, Provider, Row, Settings
from benchmarks.floors import Sizes, train_floor
from benchmarks.inputs import requests
from benchmarks.subject import Subject
from benchmarks.suites.train_step import provider
from llava_fast.inputs.plan.plan import Layout, TextPiece
from llava_fast.inputs.prepared import Prepared
from llava_fast.models.batch import Batch
from llava_fast.train.data.packing import split_packed, split_padded
from llava_fast.train.estimate.flops import sequence_flops

SAMPLES = 16
MICRO_BATCH = 4
"""The number of samples in a padded micro-batch."""
ASKED = 1.5


def cases(subject: Subject, settings: Settings) -> Iterator[Case]:
    plan = _assemble(subject, settings, list(range(SAMPLES)), "packed").plan
    rows = np.array(plan.lengths)
    costs = sequence_flops(subject.config.decoder, rows)
    padded = split_padded(range(SAMPLES), 1, MICRO_BATCH)[0]
    most = max(len(batch) * int(rows[batch].max()) for batch in padded)
    packed = split_packed(range(SAMPLES), rows, costs, 1, most)[0]
    through = sum(len(batch) * int(rows[batch].max()) for batch in padded)
    by_length = split_padded(np.argsort(rows).tolist(), 1, MICRO_BATCH)[0]
    grouped = sum(len(batch) * int(rows[batch].max()) for batch in by_length)
    supervised = len(plan.column("supervised_row"))
    sizes = Sizes(plan.tiles, len(plan.column("kept")), plan.lengths, supervised)
    yield Case(
        suite="packing",
        model=subject.label,
        real_width=subject.real_width,
        label=f"{SAMPLES} samples of {rows.min()} to {rows.max()} rows, {rows.sum()} in all; padded {through} "
        f"({grouped} if sorted by length); micro-batches of at most {most}",
        providers=[
            _provider(subject, "llava_fast", _batches(subject, settings, packed, "packed"), supervised),
            _provider(subject, "padded", _batches(subject, settings, padded, "padded"), supervised),
        ],
        check=checks.same_training(settings.dtype),
        floor=train_floor(subject.config, sizes, subject.dtype.itemsize),
        items=int(rows.sum()),
        unit="rows",
        weight_bytes=subject.weight_bytes,
        reference="padded",
    )


def _assemble(subject: Subject, settings: Settings, numbers: list[int], layout: Layout) -> Prepared:
    """Return samples, about half of them with a photograph, and answers of log-normal lengths (many short, a few
    long)."""
    processor, tiles, sequences = subject.processor, [], []
    picture = requests(settings)[0]
    for number in numbers:
        rng = np.random.default_rng(number)
        length = int(np.clip(rng.lognormal(np.log(settings.answer_tokens), 0.9), 4, 6 * settings.answer_tokens))
        question = picture if rng.random() < 0.5 else {"prompt": "USER: What is this? ASSISTANT:"}
        answer = TextPiece(rng.integers(4, 200, length).astype(np.int32), np.ones(length, bool))
        sequences.append([*processor.pieces(processor.outline(question), tiles), answer])
    return processor.assemble(sequences, tiles, layout)


def _batches(subject: Subject, settings: Settings, split: list[list[int]], layout: Layout) -> list[Batch]:
    return [Batch.from_prepared(_assemble(subject, settings, numbers, layout), subject.device) for numbers in split]


def _provider(subject: Subject, name: str, batches: list[Batch], supervised: int) -> Provider:
    def run(number: int) -> Tensor:
        total = torch.zeros((), device=subject.device)
        for batch in batches:
            loss = subject.ours(batch, logits="none").losses.sum() / supervised
            loss.backward()
            total += loss.detach()
        return total

    return replace(provider(name, subject.ours, run), run=run)  # `run` includes the backward pass of each micro-batch


def summary(rows: Sequence[Row]) -> str:
    """Compare the ratio with its target, if the check passed."""
    ratio = next(row.ratio for row in rows if row.backend == "llava_fast")
    if ratio is None:
        return "the check failed: nothing to hold against what is asked"
    verdict = "reached" if ratio >= ASKED else "MISSED"
    return f"real tokens a second, packed against padded: {ratio:.2f}x (asked {ASKED:g}x: {verdict})"
