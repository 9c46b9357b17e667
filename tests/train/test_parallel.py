"""Several processes and kills: the losses stay those of one process that nothing disturbs."""

import signal

import numpy as np
import pytest

from llava_fast.train.checkpoint import Checkpoints
from llava_fast.train.trainer import train
from runs import losses

SHAPES = {
    "ddp": {"kind": "ddp"},
    "fsdp2": {"kind": "fsdp2"},
    "tensor": {"kind": "fsdp2", "tensor": 2},
}


@pytest.fixture(scope="module")
def small(recipe_in, tmp_path_factory):
    """A recipe whose steps leave a process without an image, and one without any sample, and its own losses alone."""
    recipe = recipe_in(
        tmp_path_factory.mktemp("small") / "alone",
        batch_size=3,
        steps=5,
        micro_batch_rows=1,
        trainable=["vision_tower", "projector", "decoder"],
        checkpoints={"every": 2, "keep": 1},
    )
    train(recipe)
    return recipe


@pytest.mark.parametrize("shape", SHAPES)
def test_two_processes_give_the_losses_of_one(small, run, tmp_path, shape):
    shared = small.model_copy(
        update={"output": tmp_path / shape, "parallel": small.parallel.model_copy(update=SHAPES[shape])}
    )
    run(shared, processes=2)
    np.testing.assert_allclose(losses(shared), losses(small), rtol=1e-4)
    assert (shared.output / "model" / "config.json").exists()


def test_another_number_of_processes_goes_on(small, run, tmp_path):
    moved = small.model_copy(
        update={"output": tmp_path / "moved", "parallel": small.parallel.model_copy(update=SHAPES["fsdp2"])}
    )
    run(moved, processes=2, kill="step:5")
    assert Checkpoints(moved.output / "checkpoints", 1).steps()[0] in (2, 4)  # the newest may not have got its name yet
    train(moved)
    np.testing.assert_allclose(losses(moved), losses(small), rtol=1e-4)


@pytest.mark.parametrize(
    ("kill", "kept"),
    [
        ("staging:2", [2]),
        ("mid_file:7", [2]),
        ("before_commit:2", [2]),
        ("after_commit:2", [2, 4]),
        ("pruning:2", [2, 4]),
        ("half_pruned:4", [4]),
    ],
)
def test_killed_anywhere_it_goes_on_bit_for_bit(small, run, tmp_path, kill, kept):
    killed = small.model_copy(update={"output": tmp_path / "killed"})
    assert run(killed, kill=kill) == [-signal.SIGKILL]
    assert Checkpoints(killed.output / "checkpoints", 1).steps() == kept
    train(killed)
    assert losses(killed) == losses(small)
    assert [each.name for each in (killed.output / "checkpoints").iterdir()] == ["step-000005"]
