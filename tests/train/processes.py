"""What each of several processes runs in the tests of parallel training: `python processes.py RECIPE [KILL]`.

KILL is "where:count": this process kills itself with SIGKILL when it comes to that place for the count-th time.
"""

import os
import signal
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from llava_fast.train import checkpoint  # noqa: E402
from llava_fast.train.checkpoint import Checkpoints  # noqa: E402
from llava_fast.train.recipe import load_recipe  # noqa: E402
from llava_fast.train.trainer import Trainer, train  # noqa: E402


def kill_at(owner, name: str, count: int, after: bool = False) -> None:
    """The whole process group dies when `owner.name` is called for the count-th time."""
    stock, calls = getattr(owner, name), [0]

    def killer(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count and not after:
            die()
        result = stock(*args, **kwargs)
        if calls[0] == count and after:
            die()
        return result

    setattr(owner, name, killer)


def die() -> None:
    os.killpg(os.getpgid(0), signal.SIGKILL)


def mid_file(count: int) -> None:
    """Die inside the writing of a checkpoint's file: its first half is there."""
    stock, calls = os.fsync, [0]

    def killer(handle):
        calls[0] += 1
        if calls[0] == count:
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            die()
        return stock(handle)

    os.fsync = killer


PLACES = {
    "step": lambda count: kill_at(Trainer, "step", count),
    "staging": lambda count: kill_at(Trainer, "state", count, after=True),
    "mid_file": mid_file,
    "before_commit": lambda count: kill_at(checkpoint, "_commit", count),
    "after_commit": lambda count: kill_at(checkpoint, "_commit", count, after=True),
    "pruning": lambda count: kill_at(Checkpoints, "_prune", count),
    "half_pruned": lambda count: kill_at(checkpoint.shutil, "rmtree", count),
}

if __name__ == "__main__":
    if len(sys.argv) > 2:
        where, count = sys.argv[2].split(":")
        PLACES[where](int(count))
    train(load_recipe(Path(sys.argv[1])))
