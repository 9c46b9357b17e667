"""Timing with a warm-up period, rotating inputs and alternating providers. All samples are kept.

Providers alternate in blocks of calls, so that changes of the machine's speed affect all of them. Inputs rotate, so
that they are not always in a cache (method: QuACK's bench_utils). CUDA calls are timed by events on the current stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Sample = tuple[float, float | None]
"""(wall-clock seconds, or seconds between CUDA events; processor seconds)"""


@dataclass(frozen=True)
class Timed:
    """A function to time: `run(i)` uses input i. `prepare()` and `finish()` run before and after it, untimed."""

    run: Callable[[int], Any]
    prepare: Callable[[], Any] = lambda: None
    finish: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Quantiles:
    """Seconds per call. `cpu` is the median processor time of this process (all threads). With one thread it is less
    than the wall-clock time only if other programs used the processor. None on CUDA."""

    median: float
    p20: float
    p80: float
    cpu: float | None
    samples: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Quantiles:
        walls, cpus = zip(*samples, strict=True)
        p20, median, p80 = (float(value) for value in np.percentile(walls, (20, 50, 80)))
        return cls(median, p20, p80, None if None in cpus else float(np.median(cpus)), len(walls))


def time_in_turns(
    timed: Sequence[Timed], iters: int, warmup: float, device: torch.device, blocks: int = 8
) -> list[Quantiles]:
    """Return quantiles of `iters` calls of each function, in `blocks` alternations, after `warmup` seconds of each."""
    clock = _cuda_sample if device.type == "cuda" else _cpu_sample
    for each in timed:
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < warmup:
            clock(each, calls)
            calls += 1
    blocks = min(blocks, iters)
    sizes = [iters // blocks + (number < iters % blocks) for number in range(blocks)]
    samples: list[list[Sample]] = [[] for _ in timed]
    for size in sizes:
        for each, mine in zip(timed, samples, strict=True):
            for _ in range(size):
                mine.append(clock(each, len(mine)))
    return [Quantiles.of(mine) for mine in samples]


def _cpu_sample(timed: Timed, number: int) -> Sample:
    timed.prepare()
    start, cpu = time.perf_counter(), time.process_time()
    timed.run(number)
    sample = time.perf_counter() - start, time.process_time() - cpu
    timed.finish()
    return sample


def _cuda_sample(timed: Timed, number: int) -> Sample:
    timed.prepare()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    timed.run(number)
    end.record()
    end.synchronize()
    timed.finish()
    return start.elapsed_time(end) / 1e3, None
