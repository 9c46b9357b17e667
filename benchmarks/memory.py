"""Peak memory of one call, relative to the memory before it.

On Linux, free heap pages are returned to the system and the kernel's high-water mark is reset (proc(5): writing 5 to
/proc/self/clear_refs resets VmHWM), so nothing is missed between samples and earlier peaks do not count. On CUDA it is
the peak of the caching allocator. Elsewhere it is not measured (None).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor


class PeakMemory:
    """Use as `with PeakMemory(device) as peak: ...`, then read `peak.bytes` (None if it cannot be measured)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        release(self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = torch.cuda.memory_allocated(self.device)
        else:
            self._before = _read_status("VmRSS") if _reset_high_water() else None
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._before is not None:
            self.bytes = max(0, _read_status("VmHWM") - self._before)


def peak_beside_gradients(work: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Return the peak bytes of CPU tensors during `work`, without earlier tensors and without the final gradients of
    `weights`. It is computed from the allocations recorded by PyTorch's profiler, so it is exact, but excludes internal
    buffers of libraries and heap fragmentation. Start without gradients: a gradient that is accumulated into another
    one is counted while it exists."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with TemporaryDirectory() as directory:
        profile.export_chrome_trace(f"{directory}/trace.json")
        events = json.loads(Path(directory, "trace.json").read_text())["traceEvents"]
    recorded = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    steps = [(event["args"]["Addr"], event["args"]["Bytes"]) for event in recorded]
    latest = {address: number for number, (address, size) in enumerate(steps) if size > 0}
    left = {weight.grad.untyped_storage().data_ptr() for weight in weights if weight.grad is not None}
    gradients = {latest[address] for address in left if address in latest}
    live = peak = 0
    for number, (_, size) in enumerate(steps):
        live += 0 if number in gradients else size
        peak = max(peak, live)
    return peak


def release(device: torch.device) -> None:
    """Return free cached memory to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _read_status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])
