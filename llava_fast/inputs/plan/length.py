"""Counts the decoder rows of a sample, and truncates or drops samples that are too long for the decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from llava_fast.inputs.plan.plan import TextPiece

LengthPolicy = Literal["drop", "cut"]
Part = TypeVar("Part")
"""A TextPiece, or an image or video: a VisualPiece, or a placeholder that is not opened yet."""


class RowCounts(NamedTuple):
    """Decoder rows of one sample by content; newlines count as visual. `supervised` counts the targets of the loss,
    like a plan's `supervised_row`: a label on the first row is not a target, since no row predicts it. Rows that a
    router may leave out are counted, so `visual` is then a maximum."""

    text: int
    visual: int
    supervised: int

    @property
    def all(self) -> int:
        return self.text + self.visual


def count_rows(parts: Sequence[Part], rows: Sequence[int]) -> RowCounts:
    """The rows of one sample; rows[i] is the length of parts[i]."""
    text = sum(count for part, count in zip(parts, rows, strict=True) if isinstance(part, TextPiece))
    labels = [np.zeros(0, bool)]
    for part, count in zip(parts, rows, strict=True):
        given = part.supervised if isinstance(part, TextPiece) else None
        labels.append(np.zeros(count, bool) if given is None else given)
    return RowCounts(text, sum(rows) - text, int(np.count_nonzero(np.concatenate(labels)[1:])))


def fit(parts: Sequence[Part], rows: Sequence[int], max_rows: int, policy: LengthPolicy) -> list[Part] | None:
    """The parts of a sample that fit into `max_rows` decoder rows, or None if the sample is dropped.

    rows[i] is the length of parts[i]: from `Processor.rows_of(outline)` before any image is opened, or from a plan's
    pieces. A sample that fits is returned unchanged.
    policy  "drop": drop a sample that is too long. "cut": truncate it. Text is cut after any token; an image or video
            that does not fit completely is removed, with everything after it. A sample without remaining supervised
            rows is dropped.

    The original trainers (LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal in llava/model/llava_arch.py)
    always keep the first `tokenizer_model_max_length` rows: they cut inside an image, and keep samples without labels.
    """
    if policy not in ("drop", "cut"):
        raise ValueError(f"a length policy is 'drop' or 'cut', not {policy!r}")
    if sum(rows) <= max_rows:
        return list(parts)
    if policy == "drop":
        return None
    kept: list[Part] = []
    kept_rows: list[int] = []
    for part, count in zip(parts, rows, strict=True):
        room = max_rows - sum(kept_rows)
        whole = count <= room
        if not whole and isinstance(part, TextPiece) and room > 0:
            labels = None if part.supervised is None else part.supervised[:room]
            kept.append(dataclasses.replace(part, ids=part.ids[:room], supervised=labels))
            kept_rows.append(room)
        if not whole:
            break
        kept.append(part)
        kept_rows.append(count)
    return kept if count_rows(kept, kept_rows).supervised else None
