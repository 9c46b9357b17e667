"""One table of verdicts for all processes of a run, so that all of them compute the same bits."""

from __future__ import annotations

import torch
import torch.distributed as dist

from llava_fast.errors import BackendError
from llava_fast.ops.selection import tables


def share(device: torch.device, is_last: bool = False) -> None:
    """Give every process of the default group the same verdicts for its `device`: for each class, that of the first
    rank that has one. A collective; no effect in a single process. is_last: run no tests from here on, so that the
    verdicts stay the same.

    Raises BackendError in every process if the GPUs differ and no table is pinned, or if the settings differ
    (LLAVA_FAST_SELECT, LLAVA_FAST_SELECTION).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    settings = tables.settings()
    table, mode = settings.table(device), settings.mode_on(device.type)
    said = [(mode, table.machine, table.verdicts, settings.pinned)] * dist.get_world_size()
    dist.all_gather_object(said, said[0])
    modes, machines, verdicts, pinned = zip(*said, strict=True)
    if len({*modes}) > 1:
        raise BackendError(
            f"the processes of this run select differently ({', '.join(modes)}): give all of them the same "
            "LLAVA_FAST_SELECT and LLAVA_FAST_SELECTION"
        )
    if any(each != pinned[0] for each in pinned):
        raise BackendError(
            "the processes of this run pin different tables (LLAVA_FAST_SELECTION): give all of them the same"
        )
    if mode in ("off", "pinned"):
        return
    if device.type == "cuda":
        tables.check_one_kind(machines)
    table.verdicts = {name: verdict for each in reversed(verdicts) for name, verdict in each.items()}
    if is_last:
        table.may_grow = table.is_asked = False
