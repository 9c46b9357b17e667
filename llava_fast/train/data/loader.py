"""From a schedule to micro-batches: workers open and cut images and build plans while the device computes.

The position in the data is only the step number, so a loader can start at any step with any number of processes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import Dataset

from llava_fast.errors import TrainingError
from llava_fast.inputs.plan.length import fit
from llava_fast.inputs.plan.plan import Layout, Piece
from llava_fast.inputs.prepared import Cut, Prepared
from llava_fast.inputs.processor import Processor
from llava_fast.models.decoders.base import DecoderConfig
from llava_fast.train.data.lengths import LabelMask, described
from llava_fast.train.data.packing import Split, split_packed, split_padded
from llava_fast.train.data.run_samples import RunSamples, schedule_of
from llava_fast.train.data.samples import SampleTable
from llava_fast.train.data.workers import in_workers
from llava_fast.train.estimate.flops import sequence_flops

if TYPE_CHECKING:
    from llava_fast.train.recipe import Recipe

_Made = TypeVar("_Made")


class LeftOut(NamedTuple):
    """A sample that could not be used at its step: its number, and its problem, which includes its name."""

    number: int
    problem: str


class Made(NamedTuple):
    """A micro-batch, the names of its samples, and the samples left out of it."""

    prepared: Prepared
    names: list[str]
    left_out: list[LeftOut]


@dataclass(frozen=True)
class StepBatch:
    """One process's part of an optimiser step: its micro-batches, the names of their samples, the time that the device
    waited for them (seconds), and the samples left out. A micro-batch whose samples were all left out is kept, because
    all processes need the same number."""

    step: int
    micro_batches: list[Prepared]
    names: list[str]
    wait: float
    left_out: list[LeftOut] = field(default_factory=list)
    emptied: int = 0  # micro-batches that lost all of their samples


class MicroBatches(Dataset):
    """Dataset that maps a list of sample numbers to a micro-batch, made by a worker."""

    def __init__(self, table: SampleTable, processor: Processor, labels: LabelMask, layout: Layout, cut: bool) -> None:
        self.table, self.processor, self.labels, self.layout, self.cut = table, processor, labels, layout, cut

    def __getitem__(self, numbers: list[int]) -> Made:
        kept, sequences, tiles, left_out = each_sound(numbers, self._pieces, self.table.name)
        names = [self.table.name(number) for number in kept]
        return Made(self.processor.assemble(sequences, tiles, self.layout), names, left_out)

    def _pieces(self, number: int, tiles: list[Cut]) -> list[Piece]:
        outline = self.processor.outline(self.table[number].request, self.labels)
        if self.cut and self.processor.max_rows:
            rows = self.processor.rows_of(outline)
            outline = fit(outline, rows, self.processor.max_rows, "cut") or outline
        pieces = self.processor.pieces(outline, tiles)
        self.processor.check_length(pieces)
        return pieces


def each_sound(
    numbers: Sequence[int], make: Callable[[int, list[Cut]], _Made], name: Callable[[int], str]
) -> tuple[list[int], list[_Made], list[Cut], list[LeftOut]]:
    """Call make(number, tiles), which appends a sample's images to `tiles`, for each sample. Returns (numbers of the
    samples without error, their results, their tiles, the samples left out). name: gives a sample's name for errors."""
    tiles: list[Cut] = []
    kept, made, left_out = [], [], []
    for number in numbers:
        before = len(tiles)
        try:
            made.append(make(number, tiles))
            kept.append(number)
        except MemoryError:
            raise
        except Exception as error:  # any error: this is a worker, and the main process decides whether to stop
            del tiles[before:]  # its images before the bad one
            left_out.append(LeftOut(number, described(name(number), error)[1]))
    return kept, made, tiles, left_out


class Loader:
    """Iterates over the steps of a run from any of them. Iteration is deterministic.

    decoder          config of the model's decoder, whose FLOPs balance packed micro-batches.
    processes, rank  the number of processes that share a step, and the index of this one.
    """

    def __init__(
        self,
        recipe: Recipe,
        samples: RunSamples,
        processor: Processor,
        decoder: DecoderConfig,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        self.recipe, self.lengths, self.contents = recipe, samples.lengths, samples.begun.contents
        self.schedule = schedule_of(recipe, samples)
        self.decoder, self.processes, self.rank = decoder, processes, rank
        layout: Layout = "packed" if recipe.data.batching == "packed" else "padded"
        self.micro_batches: Dataset = MicroBatches(
            samples.table, processor, recipe.data.label_mask, layout, recipe.data.too_long == "cut"
        )
        longest = int(self.rows(range(len(self.lengths.text))).max())
        self.most_rows = recipe.micro_batch_rows or processor.max_rows or longest

    def rows(self, samples) -> np.ndarray:
        """Decoder rows of each of these samples."""
        at = np.asarray(samples, np.int64)
        return self.lengths.text[at] + self.lengths.visual[at]

    def split(self, step: int) -> Split:
        """The samples of a step, by process and micro-batch."""
        samples = [int(number) for number in self.schedule.samples(step)]
        if self.recipe.data.batching == "packed":
            return self.pack(samples)
        return split_padded(samples, self.processes, self.recipe.micro_batch)

    def pack(self, samples: list[int]) -> Split:
        """Pack samples into micro-batches, by process."""
        rows = self.rows(samples)
        return split_packed(samples, rows, sequence_flops(self.decoder, rows), self.processes, self.most_rows)

    def steps(self, first: int) -> Iterator[StepBatch]:
        """This process's batches from step `first` to the end of the run."""
        mine = (self.split(step)[self.rank] for step in range(first, self.schedule.total))
        loaded = iter(in_workers(self.micro_batches, _Numbers(mine), self.recipe.data.workers, ahead=4))
        for step in range(first, self.schedule.total):
            started = time.perf_counter()
            made: list[Made] = list(itertools.islice(loaded, len(self.split(step)[self.rank])))
            if len(made) < len(self.split(step)[self.rank]):
                raise TrainingError(f"the loader ended before step {step}")
            yield StepBatch(
                step,
                [each.prepared for each in made],
                [name for each in made for name in each.names],
                time.perf_counter() - started,
                [sample for each in made for sample in each.left_out],
                sum(bool(each.left_out) and not each.names for each in made),
            )


class _Numbers:
    """A sampler that yields the sample numbers of one micro-batch at a time, computed when a worker is free."""

    def __init__(self, splits: Iterator[list[list[int]]]) -> None:
        self.splits = splits

    def __iter__(self) -> Iterator[list[int]]:
        for micro_batches in self.splits:
            yield from micro_batches
