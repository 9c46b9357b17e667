"""Several processes and kills: the losses stay those of one process that nothing disturbs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from llava_fast.train.checkpoint import Checkpoints
from llava_fast.train.metrics import FILE, read_metrics
from llava_fast.train.trainer import train

SCRIPT = Path(__file__).with_name("processes.py")
SHAPES = {
    "ddp": {"kind": "ddp"},
    "fsdp2": {"kind": "fsdp2"},
    "tensor": {"kind": "fsdp2", "tensor": 2},
}


def losses(recipe) -> list[float]:
    values = read_metrics(recipe.output / FILE)
    assert [each["step"] for each in values] == list(range(1, len(values) + 1))  # none missing, none twice
    return [each["loss"] for each in values]


def run(recipe, processes: int = 1, kill: str = "") -> int:
    """Run a recipe in processes of its own; returns the exit status."""
    path = recipe.output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [sys.executable, str(SCRIPT), str(path), *([kill] if kill else [])]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launch, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE) as process:
        try:
            _, said = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert kill or not process.returncode, said.decode()[-4000:]
    return process.returncode


@pytest.fixture
def small(make_recipe, tmp_path):
    """A recipe whose steps leave a process without an image, and one without any sample, and its own losses alone."""
    recipe = make_recipe(
        batch_size=3,
        steps=5,
        micro_batch_rows=1,
        trainable=["vision_tower", "projector", "decoder"],
        output=str(tmp_path / "alone"),
        checkpoints={"every": 2, "keep": 1},
    )
    train(recipe)
    return recipe


@pytest.mark.parametrize("shape", SHAPES)
def test_two_processes_give_the_losses_of_one(small, tmp_path, shape):
    shared = small.model_copy(
        update={"output": tmp_path / shape, "parallel": small.parallel.model_copy(update=SHAPES[shape])}
    )
    run(shared, processes=2)
    np.testing.assert_allclose(losses(shared), losses(small), rtol=1e-4)
    assert (shared.output / "model" / "config.json").exists()


def test_another_number_of_processes_goes_on(small, tmp_path):
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
def test_killed_anywhere_it_goes_on_bit_for_bit(small, tmp_path, kill, kept):
    killed = small.model_copy(update={"output": tmp_path / "killed"})
    assert run(killed, kill=kill) == -signal.SIGKILL
    assert Checkpoints(killed.output / "checkpoints", 1).steps() == kept
    train(killed)
    assert losses(killed) == losses(small)
    assert [each.name for each in (killed.output / "checkpoints").iterdir()] == ["step-000005"]
