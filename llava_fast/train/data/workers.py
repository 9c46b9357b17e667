"""Worker processes that read and tile samples."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch.utils.data import DataLoader, Dataset

from llava_fast.orphans import end_with_parent


def in_workers(dataset: Dataset, order: Iterable[Any], workers: int, ahead: int = 2) -> DataLoader:
    """A loader that yields dataset[each] for each in `order`, computed by `workers` processes (0: this process), each
    prefetching `ahead` items. They share this process's memory and end with it.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=order,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=ahead if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_start,
    )


def _as_it_is(made: Any) -> Any:
    return made


def _start(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the tokenizer warns after the fork
    end_with_parent()
