"""The packing suite: both layouts have the same samples; its report."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from benchmarks.case import Settings, measure
from benchmarks.subject import Subject
from benchmarks.suites import packing
from tests.support.benchmark_case import CEILINGS, case


def test_both_layouts_hold_the_same_samples(monkeypatch):
    subject, settings, made = Subject("tiny", None, torch.float32, "cpu"), Settings(image_size=(96, 64)), {}
    provider = packing._provider
    monkeypatch.setattr(packing, "_provider", lambda *given: made.update({given[1]: given[2]}) or provider(*given))
    (found,) = packing.cases(subject, settings)
    subject.close()
    packed, padded = made["llava_fast"], made["padded"]
    lengths = [sorted(length for batch in side for length in batch.plan.lengths) for side in (packed, padded)]
    assert lengths[0] == lengths[1]
    assert len(lengths[0]) == packing.SAMPLES
    assert found.items == sum(lengths[0])
    through, most = (int(re.search(rf"{word} (\d+)", found.label)[1]) for word in ("padded", "at most"))
    rows = [len(batch.column("source")) for batch in padded]
    assert sum(rows) == through
    assert max(rows) == most
    rows = [len(batch.column("source")) for batch in packed]
    assert sum(rows) == found.items
    assert max(rows) <= most


@pytest.mark.parametrize(("slow", "said"), [(2.0, "2.00x (asked 1.5x: reached)"), (1.2, "1.20x (asked 1.5x: MISSED)")])
def test_the_summary(slow, said):
    rows = measure(case(1.0), Settings(iters=1, warmup=0.0), CEILINGS)
    assert said in packing.summary([dataclasses.replace(row, ratio=slow) for row in rows])
    assert "failed" in packing.summary([dataclasses.replace(row, ratio=None) for row in rows])
