"""Qwen 3 through a recipe: the same steps alone and with tensor parallelism, and the exported model."""

import numpy as np
import pytest
import torch
from transformers import LlavaNextForConditionalGeneration

import llava_fast
from llava_fast.train.run import train
from tests.support import tiny
from tests.support.training_runs import SHAPES, losses


@pytest.fixture(scope="module")
def alone(recipe_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    tiny.save(tiny.CASES["next_qwen3"], tiny.hf_model(tiny.CASES["next_qwen3"]), folder / "start")
    recipe = recipe_in(
        folder / "alone", model=str(folder / "start"), batch_size=3, steps=3, optimizer={"learning_rate": 1e-2}
    )
    train(recipe)
    return recipe


def weights(path) -> dict[str, torch.Tensor]:
    return LlavaNextForConditionalGeneration.from_pretrained(path).state_dict()


def test_it_trains_and_transformers_reads_what_is_exported(alone):
    start, end = weights(alone.model), weights(alone.output / "model")
    changed = [name for name in start if not torch.equal(start[name], end[name])]
    assert any("q_norm" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)
    llava_fast.load(alone.output / "model")


@pytest.mark.slow
def test_heads_shared_out_give_the_same_losses_and_weights(alone, run, tmp_path):
    """The norms over each head are whole on both processes, and their gradients summed."""
    parallel = alone.parallel.model_copy(update=SHAPES["tensor"])
    shared = alone.model_copy(update={"output": tmp_path / "tensor", "parallel": parallel})
    run(shared, processes=2)
    np.testing.assert_allclose(losses(shared), losses(alone), rtol=1e-4)
    expected = weights(alone.output / "model")
    for name, value in weights(shared.output / "model").items():
        if "_norm" in name:
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)
