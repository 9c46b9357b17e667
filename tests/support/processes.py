"""Runs recipes in processes that may be killed: `python -m tests.support.processes` reads a request a
line and answers each.

    {"recipe": PATH, "log": PATH, "processes": 2, "kill": "step:5", "after": 1.5}  ->  [-9, -9]

The answer is the processes' exit statuses. Everything is imported once, and each process is forked, so that a run
starts in a fraction of a second. All processes of a run are a process group, which dies whole, with SIGKILL:

    kill   "where:count": when one of them comes to that place for the count-th time (see PLACES).
    after  so many seconds after the start, wherever they are.
    alone  with `kill`: only the process that comes to that place dies. The answer then ends with how many processes of
           the run are left ten seconds later.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

torch.set_num_threads(1)

import transformers  # noqa: E402

from llava_fast.train import checkpoint  # noqa: E402
from llava_fast.train.checkpoint import RunCheckpoints  # noqa: E402
from llava_fast.train.recipe import load_recipe  # noqa: E402
from llava_fast.train.run import train  # noqa: E402
from llava_fast.train.trainer import Trainer  # noqa: E402

LIMIT = 600  # seconds: then a run hangs, and is killed


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
    "pruning": lambda count: kill_at(RunCheckpoints, "_prune", count),
    "half_pruned": lambda count: kill_at(checkpoint.shutil, "rmtree", count),
}


def run(
    recipe: str, log: str, processes: int = 1, kill: str = "", after: float | None = None, alone: bool = False
) -> list[int]:
    """Run a recipe; the exit statuses of its processes."""
    port = _free_port()
    group, pids = 0, []
    for rank in range(processes):
        pid = os.fork()
        if not pid:
            os.setpgid(0, group)
            _be_one(recipe, log, rank, processes, port, kill, alone)
        with contextlib.suppress(OSError):  # it may have done so itself
            os.setpgid(pid, group)
        group = group or pid
        pids.append(pid)
    statuses: dict[int, int] = {}
    ends = time.monotonic() + (LIMIT if after is None else after)
    while len(statuses) < processes:
        if time.monotonic() > ends:
            os.killpg(group, signal.SIGKILL)
            ends += LIMIT
        for pid in set(pids) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [statuses[pid] for pid in pids] + [_left(group)] * alone


def _left(group: int) -> int:
    """How many processes of a group are left, ten seconds from now or once there is none."""
    ends = time.monotonic() + 10
    while (left := sum(_group_of(each) == group for each in os.listdir("/proc") if each.isdigit())) > 0:
        if time.monotonic() > ends:
            os.killpg(group, signal.SIGKILL)
            break
        time.sleep(0.1)
    return left


def _group_of(pid: str) -> int:
    """The group of a process; 0 for one that has ended."""
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(group) if state != "Z" else 0


def _be_one(recipe: str, log: str, rank: int, processes: int, port: int, kill: str, alone: bool) -> None:
    """What a forked process does, to its end."""
    global die  # noqa: PLW0603 of a forked process, which ends here
    status = 1
    try:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        if processes > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        if alone:
            die = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
        if kill:
            where, count = kill.split(":")
            PLACES[where](int(count))
        train(load_recipe(Path(recipe)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    # What a run imports only when it needs it.
    _ = transformers.AutoTokenizer, transformers.get_scheduler
    with contextlib.suppress(ImportError):
        import peft  # noqa: F401
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
