"""The samples with which a run began, and which of them remain when it is resumed.

A run numbers its samples once, and its output stores everything on which their order depends. Samples may therefore be
removed from the data while the run is stopped: the others keep their numbers and their order.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llava_fast.errors import TrainingError
from llava_fast.storage.files import file_written_whole
from llava_fast.train.checkpoint import finished_steps
from llava_fast.train.data.grouping import grouped_order, word_counts
from llava_fast.train.data.lengths import Lengths
from llava_fast.train.data.mixture import epoch_order
from llava_fast.train.data.samples import SampleTable
from llava_fast.train.data.schedule import Schedule

if TYPE_CHECKING:
    from llava_fast.train.recipe import Recipe

logger = logging.getLogger("llava_fast.train")
FILE = "samples.npz"  # in a run's output


@dataclass(frozen=True)
class Begun:
    """Everything on which the order of a run's samples depends, as of the start of the run.

    contents  `SampleTable.contents`.
    identity  uint64 [n]: a hash of each sample and its source.
    source    int32 [n]: the source of each sample.
    sound     bool [n]: samples without a problem; usable bool [n]: samples that were trained on.
    visual    bool [n]: samples with an image or a video.
    words     int64 [n], see `word_counts`; empty unless batches are grouped.
    """

    contents: str
    identity: np.ndarray
    source: np.ndarray
    sound: np.ndarray
    usable: np.ndarray
    visual: np.ndarray
    words: np.ndarray


class RunSamples(NamedTuple):
    """A run's samples with their original numbers: table and lengths have an empty entry for each removed sample. left
    bool [n]: samples to train on."""

    table: SampleTable
    lengths: Lengths
    begun: Begun
    left: np.ndarray


def run_samples(recipe: Recipe, table: SampleTable, lengths: Lengths, usable: np.ndarray, first: bool) -> RunSamples:
    """The samples of a new run or, if the recipe's output has a checkpoint, of a resumed run.

    Samples that were removed from the data or have a problem now are left out, and their number is logged. Data with
    other changes is returned as it is; its order then differs, and `Trainer.resume` raises TrainingError.
    first  whether this process writes the file for the next start.
    """
    now = _begun(recipe, table, lengths, usable)
    path = recipe.output / FILE
    if not finished_steps(recipe.output / "checkpoints") or not path.exists():
        if first:
            _write(path, now)
        return RunSamples(table, lengths, now, usable)
    begun = _read(path)
    places = _places(begun, now, len(recipe.data.sources))
    if places is None:
        return RunSamples(table, lengths, now, usable)
    sound = np.zeros(len(begun.sound), bool)
    sound[places] = now.sound
    if first:
        _say(begun, now, places, lengths)
    table, lengths = _spread_table(table, begun, places), _spread_lengths(lengths, begun, places)
    return RunSamples(table, lengths, begun, begun.usable & sound)


def schedule_of(recipe: Recipe, samples: RunSamples) -> Schedule:
    """The schedule: which samples each step uses."""
    begun = samples.begun

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        numbers = epoch_order(begun.source, recipe.data.sources, recipe.data.mixing, epoch, recipe.seed)
        numbers = numbers[begun.usable[numbers]]
        if recipe.data.batching != "grouped":
            return numbers
        seed = [recipe.seed, epoch, 0, 1]  # 1: a stream of random numbers used only here
        words, visual = begun.words[numbers], begun.visual[numbers]
        return grouped_order(numbers, words, visual, recipe.batch_size, recipe.micro_batch, seed)

    return Schedule.of(order, recipe.batch_size, recipe.epochs, recipe.steps, samples.left)


def _begun(recipe: Recipe, table: SampleTable, lengths: Lengths, usable: np.ndarray) -> Begun:
    sound = np.ones(len(usable), bool)
    sound[list(lengths.problems)] = False
    words = word_counts(table) if recipe.data.batching == "grouped" else np.zeros(0, np.int64)
    return Begun(table.contents(), table.identities(), table.source_of, sound, usable, lengths.visual > 0, words)


def _places(begun: Begun, now: Begun, sources: int) -> np.ndarray | None:
    """int64 [current samples]: the original number of each. None unless the current samples are a subsequence of the
    original ones, and those without a problem are trained on as before."""
    count = len(begun.identity)
    if begun.source.max(initial=0) >= sources or len(now.identity) > count:
        return None
    before = begun.identity.tolist()
    places, at = np.empty(len(now.identity), np.int64), 0
    for number, identity in enumerate(now.identity.tolist()):
        while at < count and before[at] != identity:
            at += 1
        if at == count:
            return None
        places[number] = at
        at += 1
    both = begun.sound[places] & now.sound
    return places if np.array_equal(begun.usable[places][both], now.usable[both]) else None


def _say(begun: Begun, now: Begun, places: np.ndarray, lengths: Lengths) -> None:
    """Log which of the run's samples are no longer trained on."""
    gone = int(begun.usable.sum() - begun.usable[places].sum())
    broken = [problem for number, problem in lengths.problems.items() if begun.usable[places[number]]]
    mended = int((~begun.sound[places] & now.sound).sum())
    if gone:
        logger.warning("%d samples of this run were removed from the data; the others keep their order", gone)
    if broken:
        shown = "; ".join(broken[:5]) + "; ..." * (len(broken) > 5)
        logger.warning("%d samples can no longer be used; the others keep their order: %s", len(broken), shown)
    if mended:
        logger.warning("%d samples had a problem when this run began; it continues without them", mended)


def _spread_table(table: SampleTable, begun: Begun, places: np.ndarray) -> SampleTable:
    sizes, file_of, place_of = np.zeros((3, len(begun.source)), np.int64)
    sizes[places], file_of[places], place_of[places] = np.diff(table.offsets), table.file_of, table.place_of
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    file_of, place_of = file_of.astype(np.int32), place_of.astype(np.int32)
    return dataclasses.replace(table, offsets=offsets, source_of=begun.source, file_of=file_of, place_of=place_of)


def _spread_lengths(lengths: Lengths, begun: Begun, places: np.ndarray) -> Lengths:
    rows = np.zeros((3, len(begun.source)), np.int32)
    rows[:, places] = lengths.text, lengths.visual, lengths.supervised
    problems, kinds = (
        {int(places[number]): note for number, note in each.items()} for each in (lengths.problems, lengths.kinds)
    )
    return Lengths(rows[0], rows[1], rows[2], problems, kinds)


def _read(path: Path) -> Begun:
    try:
        with np.load(path, allow_pickle=False) as held:
            columns = {field.name: held[field.name] for field in dataclasses.fields(Begun)}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise TrainingError(f"{path} cannot be read ({error}): remove it, and the data must be as it was") from None
    return Begun(**columns | {"contents": str(columns["contents"])})


def _write(path: Path, begun: Begun) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_written_whole(path) as new, new.open("wb") as file:
        np.savez(file, **vars(begun))
