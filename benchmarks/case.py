"""A benchmark case: several providers that compute the same result, their comparison, and the measured rows.

Every provider first computes the result once, during which its peak memory is measured. Then the results are compared
with the reference, and only then are the providers timed. A provider that fails its check gets no ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.checks import Check
from benchmarks.floors import Floor
from benchmarks.machine import Ceilings
from benchmarks.memory import PeakMemory
from benchmarks.timing import Quantiles, Timed, time_in_turns

GRAPHS = "llava_fast-graphs"
LLAMA_CPP = "llama.cpp"
BACKENDS = ("llava_fast", GRAPHS, "hf-eager", "hf-compile", LLAMA_CPP)
REFERENCES = ("hf-eager", "hf-compile")
"""Possible references for checks and ratios, in order of preference."""


@dataclass(frozen=True)
class Settings:
    """The options of a run. `image_size` is (width, height). `context` is a number of cached rows (None: the length of
    a prompt with one image). `text_rows` (prefill) replaces the photograph by text of that many tokens. `warmup` is in
    seconds.

    `quantize` and `group` are the quantisation of llava_fast's decoder. `llama_bench` and `gguf_dir` are local paths
    and are not stored in the rows."""

    backends: tuple[str, ...] = ("llava_fast", "hf-eager")
    image_size: tuple[int, int] = (1024, 768)
    batch_size: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    warmup: float = 1.0
    iters: int = 20
    new_tokens: int = 32
    context: int | None = None
    answer_tokens: int = 64
    text_rows: int | None = None
    quantize: str | None = None
    group: int | None = None
    llama_bench: Path | None = None
    gguf_dir: Path | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def providers(self) -> tuple[str, ...]:
        """The backends that run in this process."""
        return tuple(name for name in self.backends if name != LLAMA_CPP)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("llama_bench", "gguf_dir")}


@dataclass(frozen=True)
class Provider:
    """One backend's computation of the result. `run(i)` is timed. `prepare` and `finish` run before and after it and
    are not timed. `result` converts the return value of `run` for the check. `compiles`: the first call compiles and is
    not measured. `peak` measures the peak memory if it is not that of one call in this process."""

    backend: str
    run: Callable[[int], Any]
    result: Callable[[Any], Any] = lambda returned: returned
    prepare: Callable[[], Any] = lambda: None
    finish: Callable[[], Any] = lambda: None
    compiles: bool = False
    peak: Callable[[], int | None] | None = None


@dataclass(frozen=True)
class PeerTimes:
    """The seconds of each call, the bytes of the weights, and additional versions for the row."""

    seconds: Sequence[float]
    weight_bytes: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Peer:
    """A program that measures its own time, run after all providers. Its results are not checked, so it has no
    ratio."""

    backend: str
    run: Callable[[], PeerTimes]


@dataclass(frozen=True)
class Case:
    """A benchmark case. One call processes `items` of `unit`. `check(result, reference result)` must pass."""

    suite: str
    model: str
    real_width: bool
    label: str
    providers: Sequence[Provider]
    check: Callable[[Any, Any], Check]
    floor: Floor
    items: float
    unit: str
    weight_bytes: int = 0
    reference: str | None = None  # the reference provider, if it is not one of REFERENCES
    calls: int = 1  # timed calls per requested call, for stages that are short
    peers: Sequence[Peer] = ()


@dataclass
class Row:
    """One row of a report. Times are in seconds per call (see timing.Quantiles), `rate` in `unit` per second. `ratio`
    is the speed-up over `reference`, or None for the reference itself and if the check failed. `disturbed`: on one CPU
    thread, the calls of the row or its reference took over 10 % more wall-clock than processor time. Then other
    programs were running and the ratio may be inaccurate."""

    suite: str
    model: str
    real_width: bool
    case: str
    backend: str
    settings: dict
    median: float
    p20: float
    p80: float
    cpu: float | None
    samples: int
    rate: float
    unit: str
    peak_memory_bytes: int | None
    weight_bytes: int
    floor_seconds: float
    floor_bound: str
    floor_share: float
    check: dict | None
    reference: str | None
    ratio: float | None
    disturbed: bool = False
    machine: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    commit: str = ""
    date: str = ""


def measure(case: Case, settings: Settings, ceilings: Ceilings) -> list[Row]:
    """Return a row for each provider of the case, then for each peer."""
    device = torch.device(settings.device)
    reference = case.reference or next((name for name in REFERENCES if name in settings.backends), None)
    results, peaks = {}, {}
    for provider in case.providers:
        if provider.compiles:
            provider.prepare()
            provider.run(0)
            provider.finish()
        provider.prepare()
        with PeakMemory(device) as peak:
            returned = provider.run(0)
        results[provider.backend] = provider.result(returned)
        peaks[provider.backend] = peak.bytes
        del returned
        provider.finish()
        if provider.peak is not None:
            peaks[provider.backend] = provider.peak()
    wanted = results.get(reference)
    checks = {
        name: case.check(result, wanted) for name, result in results.items() if wanted is not None and name != reference
    }
    results.clear()
    wanted = None  # frees large results before timing

    timed = [Timed(provider.run, provider.prepare, provider.finish) for provider in case.providers]
    times = time_in_turns(timed, settings.iters * case.calls, settings.warmup, device)
    by_backend = {provider.backend: time for provider, time in zip(case.providers, times, strict=True)}
    rows = [
        _row(case, settings, ceilings, name, quantiles, peaks[name], checks.get(name), reference, by_backend)
        for name, quantiles in by_backend.items()
    ]
    return rows + [_peer_row(case, settings, ceilings, peer) for peer in case.peers]


def _peer_row(case: Case, settings: Settings, ceilings: Ceilings, peer: Peer) -> Row:
    told = peer.run()
    time = Quantiles.of([(seconds, None) for seconds in told.seconds])
    row = _row(case, settings, ceilings, peer.backend, time, None, None, None, {})
    return replace(row, weight_bytes=told.weight_bytes, versions=dict(told.versions))


def _row(
    case: Case,
    settings: Settings,
    ceilings: Ceilings,
    backend: str,
    time: Quantiles,
    peak: int | None,
    check: Check | None,
    reference_name: str | None,
    times: Mapping[str, Quantiles],
) -> Row:
    reference = times.get(reference_name) if reference_name else None
    floor = case.floor.seconds(ceilings)
    return Row(
        suite=case.suite,
        model=case.model,
        real_width=case.real_width,
        case=case.label,
        backend=backend,
        settings=settings.as_dict(),
        median=time.median,
        p20=time.p20,
        p80=time.p80,
        cpu=time.cpu,
        samples=time.samples,
        rate=case.items / time.median,
        unit=case.unit,
        peak_memory_bytes=peak,
        weight_bytes=case.weight_bytes,
        floor_seconds=floor,
        floor_bound=case.floor.bound(ceilings),
        floor_share=floor / time.median,
        check=asdict(check) if check else None,
        reference=reference_name if reference else None,
        ratio=reference.median / time.median if reference and check and check.passed else None,
        disturbed=settings.threads == 1 and any(_disturbed(each) for each in (time, reference) if each),
    )


def _disturbed(time: Quantiles) -> bool:
    return time.cpu is not None and time.median > 1.1 * time.cpu
