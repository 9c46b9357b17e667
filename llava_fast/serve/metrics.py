"""The metrics of /metrics, in Prometheus's text format."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import Sequence

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/llava_fast/plan", "/v1/models", "/metrics", "/health", "/")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of one server, updated in the event loop. `open_answers` returns the number of admitted answers."""

    def __init__(self, scheduler: Scheduler, open_answers: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="llava_fast", registry=self.registry)
        histogram = partial(Histogram, namespace="llava_fast", registry=self.registry, buckets=SECONDS)
        self._requests = counter("requests", "Requests by path and HTTP status.", ["path", "status"])
        self._first = histogram("time_to_first_token_seconds", "From being queued to the first token.")
        self._each = histogram(
            "time_per_token_seconds", "Of each answer, per token after the first.", buckets=TOKEN_SECONDS
        )
        self._seconds = histogram("answer_seconds", "From being queued to the end.")
        self._ends = counter("answers", "Answers by how they ended.", ["reason"])
        self._prompt = counter("prompt_tokens", "Tokens of prompts, visual ones included.")
        self._visual = counter("visual_tokens", "Tokens of images and videos.")
        self._tiles = counter("tiles", "Tiles of images and videos.")
        self._tokens = counter("answer_tokens", "Tokens of answers.")
        open_now = Gauge(
            "open_answers", "Answers prepared, waiting or running.", [], "llava_fast", registry=self.registry
        )
        open_now.set_function(open_answers)
        self.registry.register(_SchedulerCollector(scheduler, "llava_fast"))

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path if path in PATHS else "other", str(status)).inc()

    def answer(self, sequence: Sequence) -> Clock:
        """Count a sequence that was just queued, and return its clock."""
        self._prompt.inc(sequence.prompt.rows)
        self._visual.inc(sequence.prompt.visual_rows)
        self._tiles.inc(sum(part.number_of_tiles for part in sequence.prompt.parts))
        return Clock(self, sequence)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Clock:
    """Measures the latencies of one answer."""

    def __init__(self, metrics: Metrics, sequence: Sequence) -> None:
        self.metrics, self.sequence = metrics, sequence
        self.queued = time.monotonic()
        self.first: float | None = None
        self.tokens = 0

    def step(self, tokens: int) -> None:
        if self.first is None and tokens:
            self.first = time.monotonic()
            self.metrics._first.observe(self.first - self.queued)
        self.metrics._tokens.inc(tokens - self.tokens)
        self.tokens = tokens

    def end(self) -> None:
        now = time.monotonic()
        self.metrics._seconds.observe(now - self.queued)
        if self.first is not None and self.tokens > 1:
            self.metrics._each.observe((now - self.first) / (self.tokens - 1))
        self.metrics._ends.labels(self.sequence.finish_reason or "cancelled").inc()


class _SchedulerCollector(Collector):
    """Collects the scheduler's counters on request. Each is a single integer, so no lock is needed."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self.scheduler, self.name = scheduler, name

    def collect(self) -> Iterator[Metric]:
        stats, features, cache = self.scheduler.stats, self.scheduler.runner.features, self.scheduler.cache
        for name, says, value in (
            ("waiting", "Answers that wait for a place.", stats.waiting),
            ("running", "Answers that run.", stats.prefilling + stats.decoding),
            ("cache_used_bytes", "Keys and values of running answers.", stats.used_blocks * cache.block_bytes),
            ("cache_kept_bytes", "Keys and values kept for later prompts.", stats.kept_blocks * cache.block_bytes),
            ("feature_bytes", "Image features that are kept.", features.bytes if features else 0),
        ):
            metric = Metric(f"{self.name}_{name}", says, "gauge")
            metric.add_sample(metric.name, {}, value)
            yield metric
        for name, says, value in (
            ("reused_tokens", "Prompt tokens found in the prefix cache.", stats.reused_rows),
            ("preemptions", "Answers that gave their place back for a time.", stats.preemptions),
            ("feature_hits", "Images found in the feature cache.", features.hits if features else 0),
            ("feature_misses", "Images that were encoded.", features.misses if features else 0),
        ):
            yield CounterMetricFamily(f"{self.name}_{name}", says, value)
