"""One DPO step on a pair: forward, loss and backward, with precomputed reference log-probabilities.

"llava_fast" runs image and question once for both answers (see train.data.pairs). "two-pass" runs the same model on two
ordinary sequences, each with the image, as the original trainers do. The vision tower is frozen, the rest is trained.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from benchmarks import checks
from benchmarks.case import Case, Settings
from benchmarks.floors import Sizes, train_floor
from benchmarks.inputs import ROTATED, describe, requests
from benchmarks.subject import Subject
from benchmarks.suites.train_step import provider
from llava_fast.inputs.plan.plan import Piece, TextPiece
from llava_fast.models.batch import Batch
from llava_fast.train.objectives.dpo import preference_losses
from llava_fast.train.objectives.reference import answer_log_probs

BETA = 0.1


def cases(subject: Subject, settings: Settings) -> Iterator[Case]:
    count = settings.answer_tokens
    answers = [_answer(4, count), _answer(90, count)]
    shared = [_batch(subject, settings, number, [answers]) for number in range(ROTATED)]
    twice = [_batch(subject, settings, number, [[answer] for answer in answers]) for number in range(ROTATED)]

    def shared_loss(number: int) -> Tensor:
        batch = shared[number % ROTATED]
        log_probs, _ = answer_log_probs(subject.ours(batch, logits="none").losses, batch.plan)
        return preference_losses(BETA * log_probs).mean()

    def two_pass_loss(number: int) -> Tensor:
        losses = subject.ours(twice[number % ROTATED], logits="none").losses
        return preference_losses(-BETA * losses.view(-1, 2, count).sum(2)).mean()

    plan = shared[0].plan
    # A branch's attention to the prefix is not counted.
    alone = [sum(plan.lengths) // len(plan.lengths) - count, count] * len(plan.lengths)
    sizes = Sizes(plan.tiles, len(plan.column("kept")), tuple(alone), 2 * count * len(plan.lengths))
    yield Case(
        suite="dpo",
        model=subject.label,
        real_width=subject.real_width,
        label=f"{describe(settings, shared[0])}, two answers of {count} tokens",
        providers=[
            provider("llava_fast", subject.ours, shared_loss),
            provider("two-pass", subject.ours, two_pass_loss),
        ],
        check=checks.same_training(settings.dtype),
        floor=train_floor(subject.config, sizes, subject.dtype.itemsize),
        items=2 * len(plan.lengths),
        unit="answers",
        weight_bytes=subject.weight_bytes,
        reference="two-pass",
    )


def _answer(first: int, count: int) -> TextPiece:
    return TextPiece(first + np.arange(count, dtype=np.int32) * 7 % 200, np.ones(count, bool))


def _batch(subject: Subject, settings: Settings, rotation: int, answers: list[list[TextPiece]]) -> Batch:
    """Return a batch in which each request occurs once per element of `answers` and ends in its pieces (one piece, or
    two as branches)."""
    processor, tiles = subject.processor, []
    sequences: list[list[Piece]] = [
        [*processor.pieces(processor.outline(request), tiles), *ends]
        for request in requests(settings, rotation)
        for ends in answers
    ]
    branches = [[len(end.ids) for end in answers[0]]] * len(sequences) if len(answers[0]) > 1 else ()
    return Batch.from_prepared(processor.assemble(sequences, tiles, branches=branches), subject.device)
