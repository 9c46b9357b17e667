"""Optimizer states in 8 bits, through torchao."""

import sys

import numpy as np
import pytest
import torch

import llava_fast
from llava_fast.errors import RecipeError
from llava_fast.train.run import train
from tests.support.training_runs import break_off, losses


@pytest.fixture
def recipe(make_recipe, tmp_path):
    """Recipes of 4 steps, whose states are float32 or take 8 bits."""

    def make(states: str):
        return make_recipe(
            trainable=["decoder.layers.1.mlp.*"],
            optimizer={"states": states},
            output=str(tmp_path / states),
            batch_size=2,
            steps=4,
            recompute="none",
            checkpoints={"every": 2},
        )

    return make


def test_8_bits_need_torchao(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(RecipeError, match=r"optimizer.states: 8bit needs torchao: pip install torchao"):
        train(recipe("8bit"))


def test_8_bits_follow_float32_and_go_on_bit_for_bit(recipe, tmp_path):
    pytest.importorskip("torchao")
    exact, rounded = recipe("float32"), recipe("8bit")
    for made in (exact, rounded):
        train(made)
    np.testing.assert_allclose(losses(rounded), losses(exact), rtol=1e-2)
    assert losses(rounded) != losses(exact)
    killed = rounded.model_copy(update={"output": tmp_path / "killed"})
    break_off(killed, 3)
    train(killed)
    assert losses(killed) == losses(rounded)
    first, second = (llava_fast.load(each.output / "model") for each in (rounded, killed))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
