"""The accelerate suite: its report, and that peak and saved bytes are measured correctly."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from benchmarks import memory
from benchmarks.case import Row, Settings, measure
from benchmarks.subject import Subject
from benchmarks.suites import accelerate
from tests.support.benchmark_case import CEILINGS, case

STOCK, FAST, LOGITS = accelerate.STOCK, accelerate.FAST, accelerate.WITH_LOGITS


def row(case: str, backend: str, median: float, peak: int, ratio: float | None) -> Row:
    return Row(
        "accelerate", "m", True, case, backend, {}, median, median, median, median, 1, 1.0, "rows", peak, 0, 1.0,
        "memory", 1.0, None, STOCK, ratio,
    )  # fmt: skip


def rows() -> list[Row]:
    step, layer = f"{accelerate.STEP}: x", f"{accelerate.LAYER}: x"
    pixels = ("processor to float32: x", "processor to uint8: x")
    return [
        row(step, STOCK, 10.0, 1000, None),
        row(step, FAST, 5.0, 500, 2.0),
        row(step, LOGITS, 8.0, 700, 1.25),
        row(layer, STOCK, 2.0, 100, None),
        row(layer, FAST, 1.0, 60, 2.0),
        row("forward: x", FAST, 1.0, 1, 0.9),
        *(row(label, "FastProcessor", 1.0, 1, 4.0) for label in pixels),
    ]


def test_the_summary_says_what_was_missed_and_estimates_32_layers():
    text = accelerate.summary(rows())
    for line in (
        "training step, accelerate: 2.00x (asked 1.3x: reached)",
        "training step, accelerate, logits: 1.25x (asked 1.3x: MISSED)",
        "forward, accelerate: 0.90x (asked 1x: MISSED)",
        "to float32, FastProcessor: 4.00x (asked 3x: reached)",
        "to uint8, FastProcessor: 4.00x (asked 5x: MISSED)",
        "step, accelerate: 0.50 of stock (asked 0.6: reached)",
        "step, accelerate, logits: 0.70 of stock (asked 0.6: MISSED)",
        # (10 + 31 * 2) / (5 + 31 * 1), (500 + 31 * 60) / (1000 + 31 * 100)
        "ESTIMATE for 32 layers from 1, accelerate: step 2.00x, peak 0.58 of stock",
    ):
        assert line in text


def test_the_summary_is_silent_about_a_row_that_failed():
    failed = [dataclasses.replace(each, ratio=None) if each.backend == FAST else each for each in rows()]
    text = accelerate.summary(failed)
    assert "accelerate:" not in text
    assert "accelerate, logits: 1.25x" in text


def test_a_disturbed_time_gets_no_verdict():
    text = accelerate.summary([dataclasses.replace(each, disturbed=True) for each in rows()])
    assert "2.00x (asked 1.3x: disturbed, measure again)" in text
    assert "0.50 of stock (asked 0.6: reached)" in text
    assert "accelerate: step disturbed, measure again, peak 0.58 of stock" in text


def test_a_peak_measured_elsewhere_and_more_calls_take_their_place():
    plain = case(1.0)
    providers = [dataclasses.replace(each, peak=lambda: 123) for each in plain.providers]
    done = measure(dataclasses.replace(plain, providers=providers, calls=4), Settings(iters=3, warmup=0.0), CEILINGS)
    assert [each.peak_memory_bytes for each in done] == [123, 123]
    assert done[0].samples == 12


def test_a_processor_must_agree_in_every_bit():
    ids, pixels = np.arange(4), np.ones((2, 3), np.float32)
    assert accelerate.same_inputs((ids, pixels), (ids, pixels)).passed
    assert not accelerate.same_inputs((ids, np.nextafter(pixels, 2)), (ids, pixels)).passed
    assert not accelerate.same_inputs((ids[:3], pixels), (ids, pixels)).passed


def test_the_bytes_that_a_layer_keeps():
    subject = Subject("tiny", None, torch.float32, "cpu")
    kept = [accelerate._layer(STOCK, subject.hf, [length], subject).peak() for length in (40, 80)]
    subject.close()
    assert kept[0] > 4 * 40 * (3 * 128 + 3 * 352)  # at least the input, both norms' rows, and the MLP's three
    assert kept[1] == 2 * kept[0]  # rows alone: neither weights nor tables are in it


def test_the_peak_counts_all_but_weights_and_gradients():
    weight, rows = torch.nn.Parameter(torch.randn(3000, 400)), torch.randn(10, 400)

    def peak(left):
        weight.grad = None
        return memory.peak_beside_gradients(lambda: (rows @ weight.T).square().sum().backward(), left)

    kept = 4 * 10 * 3000  # the product; with it its square, or its gradient
    assert 2 * kept <= peak([weight]) <= 4 * kept + 1000
    assert weight.nbytes <= peak([]) <= peak([weight]) + weight.nbytes


def test_the_peak_of_a_step():
    settings, threads = Settings(image_size=(96, 64), answer_tokens=4), torch.get_num_threads()
    stock, fast = (accelerate.peak_of_step(name, "tiny", None, "cpu", settings) for name in (STOCK, FAST))
    torch.set_num_threads(threads)
    assert 0 < fast < stock
