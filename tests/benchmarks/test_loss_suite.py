"""The loss suite: the peak memory of the loss at a full vocabulary, and that the measurement works."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.case import Settings, measure
from benchmarks.suites import loss
from tests.support.benchmark_case import CEILINGS, case

VOCABULARY = 32064


@pytest.fixture(scope="module")
def peaks():
    """Of each side, at a small width: the table of logits does not depend on it."""
    hidden, weight = torch.randn(loss.ROWS, 64), nn.Parameter(torch.randn(VOCABULARY, 64) / 8)
    found = {}
    for provider in loss.providers(hidden, weight):
        provider.run(0)
        provider.finish()
        found[provider.backend] = provider.peak()
    if None in found.values():
        pytest.skip("peak memory is not measured on this system")
    return found


def test_the_loss_needs_a_tenth_of_the_table_of_logits(peaks):
    assert 200 * 64 * 4 < peaks["llava_fast"] <= loss.table_bytes(VOCABULARY) / 10


def test_the_table_is_seen_where_it_is_made(peaks):
    assert peaks["hf-eager"] > loss.table_bytes(VOCABULARY)


@pytest.mark.parametrize(("peak", "said"), [(10**7, "0.038 of the table (asked 0.1: reached)"), (10**8, "MISSED")])
def test_the_summary(peak, said):
    label = f"{loss.ROWS} rows, 200 supervised, 64 wide, vocabulary {VOCABULARY}: x"
    rows = measure(dataclasses.replace(case(1.0), label=label), Settings(iters=1, warmup=0.0), CEILINGS)
    rows = [dataclasses.replace(row, peak_memory_bytes=peak) for row in rows]
    assert said in loss.summary(rows)
    assert "not measured" in loss.summary([dataclasses.replace(row, ratio=None) for row in rows])
