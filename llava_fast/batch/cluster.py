"""A batch on a Ray cluster: one task reads the input, Ray Data's actors answer chunks of it, rows come back here.

Ray Data holds the reader back where the actors are slower, starts a dead actor anew and gives its chunk to another.
Rows come in any order; Output puts them in the input's.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import pickle
import queue
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from llava_fast.batch.answering import PATIENCE, Answerer, Settings
from llava_fast.batch.items import Item, Source
from llava_fast.batch.job import ModelSpec, Steps
from llava_fast.batch.output import GO_ON, Output
from llava_fast.errors import BatchError, MissingPackageError

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
READERS = 2
"""Cores of the tasks that read the input and hand it out; without one each, a long input would never get on."""
CHUNK_ITEMS, CHUNK_BYTES = 64, 32 << 20
"""A chunk is what an actor answers at once, and what is done again if it dies."""


@dataclass(frozen=True)
class Cluster:
    """Makes answers on Ray's workers (see job.Runs).

    address  a cluster's; None: the one of RAY_ADDRESS, or else Ray is started on this machine.
    workers  how many actors, each with a model; None: one for each GPU, or without GPUs one for each core but
             READERS (of this machine: each core).

    Raises MissingPackageError without Ray, BatchError where it cannot be reached or a worker fails for good.
    """

    address: str | None = None
    workers: int | None = None

    def __call__(
        self, model: ModelSpec, settings: Settings, source: Source, first: int, limit: int | None, output: Output
    ) -> Steps:
        check_ray()
        import ray

        reading = _Reading(source, first, limit, output.waiting)
        with joined(self.address, self.workers):
            batches = self._dataset(reading, model.anywhere, settings).iter_batches(
                batch_size=None, batch_format="numpy"
            )
            try:
                for batch in polled(batches, PATIENCE):
                    rows = () if batch is None else zip(batch["number"], batch["row"], strict=True)
                    yield [(int(number), json.loads(row)) for number, row in rows]
            except ray.exceptions.RayError as error:
                cause = " ".join(str(getattr(error, "cause", None) or error).split())
                problem = f"Ray's workers failed: {cause[-500:]}; mend that, then {GO_ON}"
                raise BatchError(problem) from error

    def _dataset(self, reading: _Reading, model: ModelSpec, settings: Settings) -> Any:
        import ray

        resources = ray.cluster_resources()
        device = model.options.get("device")
        on_gpus = device != "cpu" and resources.get("GPU", 0) >= 1
        places = int(resources["GPU"] if on_gpus else resources["CPU"] - READERS)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # job.run has one
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        chunks = ray.data.read_datasource(_datasource(reading), override_num_blocks=1)
        one_each = chunks.repartition(target_num_rows_per_block=1)  # the reader's blocks hold many
        return one_each.map_batches(
            _Worker,
            fn_constructor_args=(model, settings, on_gpus),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=self.workers or max(1, places)),
            num_cpus=1,
            num_gpus=1 if on_gpus else 0,
        )


@dataclass(frozen=True)
class _Reading:
    """Which items are left to do; read on one worker."""

    source: Source
    first: int
    limit: int | None
    done: frozenset[int]

    def chunks(self) -> Iterator[list[Item]]:
        items = itertools.islice(self.source.items(self.first), None if self.limit is None else self.limit - self.first)
        chunk, size = [], 0
        for item in items:
            if item.number in self.done:
                continue
            chunk.append(item)
            size += sum(len(media) for media in (*item.images, item.video or ""))
            if len(chunk) == CHUNK_ITEMS or size > CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk


class _Worker:
    """A model in an actor of its own."""

    def __init__(self, model: ModelSpec, settings: Settings, on_gpu: bool) -> None:
        import torch

        torch.set_num_threads(1)  # an actor has one core
        self.answerer = Answerer(model.load(), settings if on_gpu else replace(settings, workers=1))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        items = [item for chunk in batch["items"] for item in pickle.loads(chunk)]
        rows = [row for step in self.answerer.steps(items) for row in step]
        return {"number": [number for number, _ in rows], "row": [json.dumps(row) for _, row in rows]}


def polled(items: Iterable[T], seconds: float) -> Iterator[T | None]:
    """The items, read in a thread, and None whenever the next takes longer than so many seconds. Raises what they
    raise."""
    arrived: queue.SimpleQueue[tuple[T | None, BaseException | None, bool]] = queue.SimpleQueue()

    def read() -> None:
        try:
            for item in items:
                arrived.put((item, None, False))
            arrived.put((None, None, True))
        except BaseException as error:
            arrived.put((None, error, True))

    threading.Thread(target=read, name="llava-fast-rows", daemon=True).start()
    while True:
        try:
            item, error, ended = arrived.get(timeout=seconds)
        except queue.Empty:
            yield None
            continue
        if error is not None:
            raise error
        if ended:
            return
        yield item


def check_ray() -> None:
    """Raises MissingPackageError."""
    if importlib.util.find_spec("ray") is None:
        raise MissingPackageError("--ray", "Ray", "ray")


@contextmanager
def joined(address: str | None, workers: int | None) -> Iterator[None]:
    """Ray, joined or started, and left again. One that a caller has joined already is used and left alone."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: workers starve beside anything else
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    is_local = address is None and "RAY_ADDRESS" not in os.environ
    cores = len(os.sched_getaffinity(0)) if workers is None else workers
    options: dict[str, Any] = {"address": address}
    if is_local:
        options = {"num_cpus": cores + READERS, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = address or os.environ.get("RAY_ADDRESS", "this machine")
        raise BatchError(f"Ray cannot be joined at {where}: {' '.join(str(error).split())}") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"ray\.")  # of its own settings
            yield
    finally:
        ray.shutdown()


def _datasource(reading: _Reading) -> Any:
    """Ray Data's view of the input: one task that yields a block of one row, a pickled chunk, after another."""
    import pyarrow
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def blocks() -> Iterator[pyarrow.Table]:
        for chunk in reading.chunks():
            yield pyarrow.table({"items": pyarrow.array([pickle.dumps(chunk)], pyarrow.large_binary())})

    class Chunks(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *more: Any, **options: Any) -> list[ReadTask]:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(blocks, unknown)]

    return Chunks()
