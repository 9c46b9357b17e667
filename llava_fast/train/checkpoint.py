"""Checkpoints of a run: atomic writes, discovery, pruning.

A checkpoint is a directory `step-000500` in PyTorch's distributed checkpoint format. The state is copied to the host; a
thread then writes it under a temporary name while training continues, and flushes it to disk. The directory is renamed
once every process has finished, so one with a temporary name is incomplete.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from llava_fast.errors import TrainingError

# Raised for every checkpoint of a single-process run, also by the writing thread.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)

_NAME = re.compile(r"step-(\d{6,})")


def finished_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a directory, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(found[1]) for each in directory.iterdir() if (found := _NAME.fullmatch(each.name)))


class RunCheckpoints:
    """The checkpoints in a directory. Every method is a collective."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep
        self._writing: tuple[Future, Path, Path] | None = None
        self._group: Any = None if _alone() else dist.new_group(backend="gloo")  # used only by the writing threads

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        return finished_steps(self.directory)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy `state`, a nested dict of tensors and plain values, and write it as the checkpoint of `step` while
        training continues (or synchronously, if the copy cannot be made). The checkpoint exists after a `poll` that
        finds it written, or after `finish`.
        """
        self.finish()
        final = self.path(step)
        part = final.with_name(f".{final.name}.part")
        if _first():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self._together()
        how: dict[str, Any] = {"storage_writer": dcp.FileSystemWriter(part, sync_files=True), "no_dist": _alone()}
        future: Any = Future()
        if all(_can_be_staged(leaf) for leaf in tree_leaves(state)):
            future = dcp.async_save(state, process_group=self._group, **how)
        else:
            dcp.save(state, process_group=self._group, **how)
            future.set_result(None)
        self._writing = (future, part, final)

    def poll(self) -> None:
        """Rename the checkpoint being written to its final name, if every process has finished."""
        if self._writing is None:
            return
        done = torch.tensor([int(self._writing[0].done())])
        if not _alone():
            dist.all_reduce(done, dist.ReduceOp.MIN)
        if done.item():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint being written."""
        if self._writing is None:
            return
        (future, part, final), self._writing = self._writing, None
        future.result()
        self._together()
        if _first():
            _flush(part)
            _commit(part, final)
            self._prune()
        self._together()

    def _together(self) -> None:
        if self._group is not None:
            dist.barrier()

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Fill `state` in place from a checkpoint. Raises TrainingError if it does not match."""
        try:
            dcp.load(state, storage_reader=dcp.FileSystemReader(self.path(step)), no_dist=_alone())
        except (dcp.CheckpointException, RuntimeError, ValueError, KeyError) as error:
            raise TrainingError(
                f"{self.path(step)} does not match this recipe's model and optimizer: {_last_line(error)} "
                "Start again in another output directory, or go back to the recipe that wrote it"
            ) from error

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            _hide(self.path(step))
        for leftover in [*self.directory.glob(".step-*.old"), *self.directory.glob(".step-*.part")]:
            shutil.rmtree(leftover, ignore_errors=True)


def _can_be_staged(value: Any) -> bool:
    """Whether DCP can stage it on the host, which it cannot for wrapper tensors such as torchao's 8-bit states."""
    if isinstance(value, DTensor):
        value = value.to_local()
    return not isinstance(value, Tensor) or type(value) in (Tensor, Parameter)


def _last_line(error: BaseException) -> str:
    """The last line of an error: the text of a CheckpointException consists of every process's stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1] if lines else type(error).__name__


def _commit(part: Path, final: Path) -> None:
    """Rename a finished checkpoint to its final name."""
    if final.exists():  # from before the run was resumed at an earlier step
        _hide(final)
    part.rename(final)
    _flush(final.parent)


def _hide(whole: Path) -> None:
    """Rename a checkpoint before deleting it, so that a partial directory never has its name."""
    hidden = whole.with_name(f".{whole.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    whole.rename(hidden)


def _alone() -> bool:
    return not dist.is_initialized()


def _first() -> bool:
    return _alone() or dist.get_rank() == 0


def _flush(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
