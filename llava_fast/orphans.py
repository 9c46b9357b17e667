"""Makes child processes exit when their parent dies, for any reason."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.connection import wait

_EVERY = 1.0  # seconds between two checks
_watched: int | None = None  # the process whose watch has begun: a forked child inherits the value and no thread


def end_with_parent() -> None:
    """Exit as soon as the parent of this process dies: the process that started it and, for a multiprocessing child,
    the one that requested it (there may be a fork server between them). May be called repeatedly.

    Otherwise a DataLoader worker never exits: it joins its queue's thread, which writes to a pipe whose other end is
    held open by its siblings. PR_SET_PDEATHSIG fires when the parent's *thread* ends, so a thread of this process
    checks instead.
    """
    global _watched  # noqa: PLW0603 a fact of the process
    if _watched == os.getpid():
        return
    _watched = os.getpid()
    threading.Thread(target=_watch, args=(os.getppid(),), name="end_with_parent", daemon=True).start()


def _watch(starter: int) -> None:
    asked = multiprocessing.parent_process()
    while os.getppid() == starter:
        if asked is None:
            time.sleep(_EVERY)
        elif wait([asked.sentinel], _EVERY):  # a pipe's end, closed by the parent's death
            break
    os._exit(1)
