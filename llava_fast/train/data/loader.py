"""From a schedule to micro-batches: workers open and cut images and build plans while the device computes.

The position in the data is the step alone, so a loader starts anywhere, and with any number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from llava_fast.errors import LlavaFastError, TrainingError
from llava_fast.inputs.length import fit
from llava_fast.inputs.plan import Layout
from llava_fast.inputs.processor import Cut, Prepared, Processor
from llava_fast.models.config import DecoderConfig
from llava_fast.train.data.lengths import LabelMask, Lengths
from llava_fast.train.data.packing import Split, split_packed, split_padded
from llava_fast.train.data.samples import SampleTable
from llava_fast.train.data.schedule import Schedule
from llava_fast.train.data.workers import in_workers
from llava_fast.train.estimate.flops import sequence_flops
from llava_fast.train.recipe import Recipe


@dataclass(frozen=True)
class StepBatch:
    """What one process runs in one optimiser step: its micro-batches, the names of their samples, and how long the
    device waited for them (seconds)."""

    step: int
    micro_batches: list[Prepared]
    names: list[str]
    wait: float


class MicroBatches(Dataset):
    """A micro-batch by its sample numbers: what a worker makes."""

    def __init__(self, table: SampleTable, processor: Processor, labels: LabelMask, layout: Layout, cut: bool) -> None:
        self.table, self.processor, self.labels, self.layout, self.cut = table, processor, labels, layout, cut

    def __getitem__(self, numbers: list[int]) -> tuple[Prepared, list[str]]:
        tiles: list[Cut] = []
        sequences, names = [], []
        for number in numbers:
            sample = self.table[number]
            names.append(sample.name)
            try:
                outline = self.processor.outline(sample.request, self.labels)
                if self.cut and self.processor.max_rows:
                    rows = self.processor.rows_of(outline)
                    outline = fit(outline, rows, self.processor.max_rows, "cut") or outline
                sequences.append(self.processor.pieces(outline, tiles))
                self.processor.check_length(sequences[-1])
            except LlavaFastError as error:
                raise type(error)(f"{sample.name}: {error}") from None
        return self.processor.assemble(sequences, tiles, self.layout), names


class Loader:
    """Iterates over the steps of a run from any of them. Iteration is deterministic.

    decoder          the model's, whose operations packed micro-batches are balanced by.
    processes, rank  how many processes share a step, and which of them this is.
    """

    def __init__(
        self,
        recipe: Recipe,
        table: SampleTable,
        lengths: Lengths,
        schedule: Schedule,
        processor: Processor,
        decoder: DecoderConfig,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        self.recipe, self.lengths, self.schedule, self.contents = recipe, lengths, schedule, table.contents()
        self.decoder, self.processes, self.rank = decoder, processes, rank
        layout: Layout = "packed" if recipe.data.batching == "packed" else "padded"
        self.micro_batches: Dataset = MicroBatches(
            table, processor, recipe.data.label_mask, layout, recipe.data.too_long == "cut"
        )
        self.most_rows = recipe.micro_batch_rows or processor.max_rows or int(np.max(self.rows(range(len(table)))))

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
        """Samples in packed micro-batches, by process."""
        rows = self.rows(samples)
        return split_packed(samples, rows, sequence_flops(self.decoder, rows), self.processes, self.most_rows)

    def steps(self, first: int) -> Iterator[StepBatch]:
        """Batches of this process from step `first` to the end of the run."""
        mine = (self.split(step)[self.rank] for step in range(first, self.schedule.total))
        loaded = iter(in_workers(self.micro_batches, _Numbers(mine), self.recipe.data.workers, ahead=4))
        for step in range(first, self.schedule.total):
            started = time.perf_counter()
            made = [next(loaded, None) for _ in self.split(step)[self.rank]]
            if any(each is None for each in made):
                raise TrainingError(f"the loader ended before step {step}")
            batches = [prepared for prepared, _ in made]  # type: ignore[misc]
            names = [name for _, each in made for name in each]  # type: ignore[misc]
            yield StepBatch(step, batches, names, time.perf_counter() - started)


class _Numbers:
    """The sampler: sample numbers of one micro-batch after the other, made when a worker is free."""

    def __init__(self, splits: Iterator[list[list[int]]]) -> None:
        self.splits = splits

    def __iter__(self) -> Iterator[list[int]]:
        for micro_batches in self.splits:
            yield from micro_batches
