"""The environment of a measurement: machine, versions, commit, and the measured peak rates of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llava_fast.ops.quantised_linear import QuantisedWeight, native
from llava_fast.ops.quantised_linear.memory import in_huge_pages

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow")
SOURCES = ("llava_fast", "csrc", "benchmarks/*.py", "benchmarks/suites", "setup.py")


@dataclass(frozen=True)
class Ceilings:
    """Measured peak rates with the threads of the run. Memory: bytes per second of a copy, a matrix-vector product or,
    on a CPU, one with int8 weights by csrc/decode, whichever is largest; on a CPU in huge pages. Arithmetic: operations
    per second of a 2048-wide matrix product (8192 on a GPU) in the run's dtype."""

    bytes_per_second: float
    flops_per_second: float


def describe(device: str, threads: int) -> dict:
    """Describe the machine. `kind` is a short name ("cpu-2core", or the GPU's name). `load_before` is the load average
    of the last minute, since other load makes times noisy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = f"cpu-{cores}core" if device == "cpu" else torch.cuda.get_device_name(device)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "kind": kind,
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": threads,
        "device": device,
        "load_before": load,
    }


def versions() -> dict[str, str]:
    import llava_fast

    found = {"python": platform.python_version(), "llava_fast": llava_fast.__version__}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def commit() -> str:
    """Return the measured commit, with "+changes" if tracked or new sources differ from it. Outside a checkout: the
    variable LLAVA_FAST_COMMIT, or "unknown"."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--", *SOURCES) else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LLAVA_FAST_COMMIT", "unknown")


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measure for about two seconds and keep the best try, since other load can only lower the rates. On one CPU
    thread, processor time is measured. On a GPU, a try is several calls between two events, which excludes gaps between
    launches, and the product's values are random, because constant values make a GPU faster."""
    on_cpu = torch.device(device).type == "cpu"
    source = in_huge_pages(torch.empty(1 << (25 if on_cpu else 28), dtype=torch.float32, device=device)).fill_(1)
    target, vector = torch.empty_like(source), torch.ones(4096, device=device)
    side = 2048 if on_cpu else 8192
    square = torch.randn(side, side, dtype=dtype, device=device)
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source), device)
    read = source.nbytes / _best(lambda: source.view(-1, 4096) @ vector, device)
    if on_cpu:
        codes = source.view(torch.int8).view(-1, 4096)
        weight = QuantisedWeight.unchecked(codes, torch.ones(len(codes), 1))
        row = vector[None]
        read = max(read, source.nbytes / _best(lambda: native.quantised_linear(row, weight, None), device))
    product = 2 * side**3 / _best(lambda: square @ square, device)
    return Ceilings(max(copy, read), product)


def as_dict(ceilings: Ceilings) -> dict:
    return asdict(ceilings)


def _best(work: Callable[[], object], device: str, seconds: float = 0.7) -> float:
    if torch.device(device).type != "cpu":
        return _best_on_gpu(work, seconds)
    # The processor time of one thread does not depend on the load of the machine.
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = clock()
        work()
        best = min(best, clock() - before)
    return best


def _best_on_gpu(work: Callable[[], object], seconds: float, calls: int = 10) -> float:
    work()  # loads the kernel
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / calls)
    return best


def _cpu_name() -> str:
    try:
        return re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
