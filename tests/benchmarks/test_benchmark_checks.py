"""Each agreement check must let the same pass and anything else fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import checks
from benchmarks.checks import Greedy
from benchmarks.suites.decode import gaps


def test_pixels_must_be_equal_to_the_bit():
    tiles = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), dtype=np.uint8)
    assert checks.equal_pixels(tiles, tiles.astype(np.int16)).passed
    other = tiles.copy()
    other[1, 2, 3, 3] ^= 1
    assert not checks.equal_pixels(other, tiles).passed
    assert not checks.equal_pixels(tiles[:1], tiles).passed


def test_relative_difference_is_of_the_largest():
    wanted = torch.tensor([1.0, -4.0])
    assert checks.relative_difference(torch.tensor([1.0, -3.0]), wanted) == 0.25
    assert checks.relative_difference(wanted[:1], wanted) == float("inf")
    assert not checks.close("x", "float32")(wanted * (1 + 2e-4), wanted).passed
    assert checks.close("x", "bfloat16")(wanted * (1 + 2e-4), wanted).passed


def test_tokens_may_part_only_at_a_tie():
    check = checks.same_greedy("float32")
    wanted = Greedy([[1, 2, 3]], [[0.5, 0.5, 0.5]])
    assert check(Greedy([[1, 2, 3]]), wanted).passed
    assert not check(Greedy([[1, 9, 3]]), wanted).passed
    tied = Greedy([[1, 2, 3]], [[0.5, 1e-6, 0.5]])
    assert check(Greedy([[1, 9, 7]]), tied).passed
    assert not check(Greedy([[9, 2, 3]]), tied).passed  # the tie is later than where they part


def test_logits_after_the_answer_count():
    check = checks.same_greedy("float32")
    logits = torch.tensor([[1.0, 2.0]])
    wanted = Greedy([[1, 2]], [[0.5, 0.5]], logits)
    assert check(Greedy([[1, 2]], next_logits=logits), wanted).passed
    assert not check(Greedy([[1, 2]], next_logits=logits * 1.01), wanted).passed


def test_gap_is_best_to_second_over_largest():
    assert gaps(torch.tensor([[-8.0, 1.0, 3.0]])).tolist() == [0.25]


def test_gradients_count_each_against_its_own_size():
    check = checks.same_training("float32")
    wanted = {"loss": torch.tensor([2.0]), "big": torch.tensor([1.0]), "small": torch.tensor([1e-3])}
    assert check(dict(wanted), wanted).passed
    assert not check(wanted | {"small": torch.tensor([1.001e-3])}, wanted).passed
    assert not check(wanted | {"loss": torch.tensor([2.001])}, wanted).passed
    assert not check(wanted | {"small": torch.tensor([float("nan")])}, wanted).passed
    assert not check({"loss": wanted["loss"], "big": wanted["big"]}, wanted).passed


def test_a_gradient_that_is_truly_zero_is_judged_by_the_models_largest():
    check = checks.same_training("float32")
    wanted = {"loss": torch.tensor([1.0]), "big": torch.tensor([1.0]), "zero": torch.tensor([0.0])}
    assert check(wanted | {"zero": torch.tensor([1e-11])}, wanted).passed
    assert not check(wanted | {"zero": torch.tensor([1e-9])}, wanted).passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_has_limits(dtype):
    assert 0 < checks.RELATIVE_LIMIT[dtype] < 0.1
    assert 0 < checks.TIE_LIMIT[dtype] < 0.1
