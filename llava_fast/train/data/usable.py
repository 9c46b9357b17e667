"""Selects the samples of a run: those that are valid and short enough or truncated; and their lengths."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from llava_fast.errors import DataError
from llava_fast.inputs.plan.length import count_rows, fit
from llava_fast.inputs.processor import Processor
from llava_fast.train.data.lengths import LabelMask, Lengths
from llava_fast.train.data.samples import SampleTable

if TYPE_CHECKING:
    from llava_fast.train.recipe import Recipe

logger = logging.getLogger("llava_fast.train")


def usable_samples(
    recipe: Recipe, table: SampleTable, lengths: Lengths, processor: Processor, quiet: bool = False
) -> tuple[np.ndarray, Lengths]:
    """(bool [samples]: those to train on, their lengths after truncation). Raises DataError for samples with a problem
    unless the recipe skips them, and if no sample is left."""
    problems = lengths.problems
    if problems and recipe.data.on_problem == "stop":
        shown = "\n".join(f"  {text}" for text in list(problems.values())[:5])
        raise DataError(
            f"{len(problems)} samples cannot be trained on:\n{shown}\n`llava-fast data check` lists all; fix them, or "
            "set data.on_problem: skip"
        )
    sound = np.ones(len(lengths.text), bool)
    sound[list(problems)] = False
    most = processor.max_rows or np.iinfo(np.int32).max
    too_long = sound & (lengths.text + lengths.visual > most)
    if recipe.data.too_long == "cut":
        lengths = _cut(table, lengths, np.flatnonzero(too_long), processor, recipe.data.label_mask, quiet)
    usable = sound & (lengths.text + lengths.visual <= most) & (lengths.supervised > 0)
    if not quiet:
        logger.info(
            "%d samples: %d to train on (%d of them cut), %d with a problem, %d left out as longer than %d rows",
            *(len(sound), usable.sum(), (usable & too_long).sum(), len(problems), (too_long & ~usable).sum(), most),
        )
    if not usable.any():
        raise DataError("no sample is left to train on: `llava-fast data check` shows why")
    return usable, lengths


def _cut(
    table: SampleTable, lengths: Lengths, numbers: np.ndarray, processor: Processor, labels: LabelMask, quiet: bool
) -> Lengths:
    """Lengths after truncating samples `numbers`; samples without remaining supervised rows keep their lengths."""
    text, visual, supervised = lengths.text.copy(), lengths.visual.copy(), lengths.supervised.copy()
    for number in tqdm(numbers, desc="cut to length", unit="sample", disable=quiet or not len(numbers)):
        outline = processor.outline(table[int(number)].request, labels)
        kept = fit(outline, processor.rows_of(outline), processor.max_rows or 0, "cut")
        if kept is not None:
            text[number], visual[number], supervised[number] = count_rows(kept, processor.rows_of(kept))
    return dataclasses.replace(lengths, text=text, visual=visual, supervised=supervised)
