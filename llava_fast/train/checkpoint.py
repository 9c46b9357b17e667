"""Checkpoints of a run: written whole or not at all, found again, pruned.

A checkpoint is a directory `step-000500` of PyTorch's distributed checkpoint format. It is written under another
name, flushed to disk, and renamed once every process has finished; one that lacks its name was never finished.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from llava_fast.errors import TrainingError

_NAME = re.compile(r"step-(\d{6,})")


class Checkpoints:
    """The checkpoints in a directory. All processes call `save` and `load` together."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, in order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(found[1]) for each in self.directory.iterdir() if (found := _NAME.fullmatch(each.name)))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state`, a nested dict of tensors and plain values, as the checkpoint of `step`."""
        final = self.path(step)
        part = final.with_name(f".{final.name}.part")
        if _first():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        _together()
        with _alone_is_fine():
            dcp.save(state, storage_writer=dcp.FileSystemWriter(part, sync_files=True), no_dist=_alone())
        _together()
        if _first():
            _flush(part)
            _commit(part, final)
            self._prune()
        _together()
        return final

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Fill `state` in place from a checkpoint. Raises TrainingError if it does not fit."""
        try:
            with _alone_is_fine():
                dcp.load(state, storage_reader=dcp.FileSystemReader(self.path(step)), no_dist=_alone())
        except (dcp.CheckpointException, RuntimeError, ValueError, KeyError) as error:
            raise TrainingError(
                f"{self.path(step)} does not fit this recipe's model and optimizer: {error}. "
                "Start again in another output directory, or go back to the recipe that wrote it"
            ) from error

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            _hide(self.path(step))
        for leftover in [*self.directory.glob(".step-*.old"), *self.directory.glob(".step-*.part")]:
            shutil.rmtree(leftover, ignore_errors=True)


def _commit(part: Path, final: Path) -> None:
    """The moment from which a checkpoint exists."""
    if final.exists():  # of a run that was resumed from an earlier step
        _hide(final)
    part.rename(final)
    _flush(final.parent)


def _hide(whole: Path) -> None:
    """Take away a checkpoint's name first, so that half a directory never bears it."""
    hidden = whole.with_name(f".{whole.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    whole.rename(hidden)


def _alone() -> bool:
    return not dist.is_initialized()


@contextlib.contextmanager
def _alone_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _first() -> bool:
    return _alone() or dist.get_rank() == 0


def _together() -> None:
    if not _alone():
        dist.barrier()


def _flush(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
