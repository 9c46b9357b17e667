"""Optimizer states in 8 bits, through torchao."""

import sys

import pytest

from llava_fast.errors import RecipeError
from llava_fast.train.trainer import train


def test_8_bits_need_torchao(make_recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(RecipeError, match="optimizer.states: 8bit needs torchao: pip install torchao"):
        train(make_recipe(optimizer={"states": "8bit"}))
