"""Peak memory of one call, above what was resident before it.

On Linux the kernel's own high-water mark is reset (proc(5): writing 5 to /proc/self/clear_refs resets VmHWM) after
freed heap pages have gone back to the system, so nothing is missed between samples and an earlier call's peak does
not count. On CUDA it is the caching allocator's peak. Elsewhere it is not measured (None).
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
    """`with PeakMemory(device) as peak: ...`, then `peak.bytes` (None where it cannot be measured)."""

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
    """Bytes of CPU tensors that `work` needs at its highest, what was there before and the gradients that it leaves in
    `weights` not counted. From each allocation and release that PyTorch's profiler records, so it is exact, but what a
    library takes by itself (a matrix product's scratch, a heap's gaps) is not in it. Start without gradients: one that
    is added to another is counted, as long as it is there."""
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
    """Give memory that is free but still held back to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _read_status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])
