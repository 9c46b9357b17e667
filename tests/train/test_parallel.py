"""Several processes and kills: the losses equal those of one undisturbed process."""

import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llava_fast.errors import RecipeError
from llava_fast.train import parallel
from llava_fast.train.checkpoint import RunCheckpoints
from llava_fast.train.objectives.reference import weights_mark
from llava_fast.train.parallel import World, join_world
from llava_fast.train.run import load_model, train
from tests.support import tiny
from tests.support.training_runs import SHAPES, losses


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


@pytest.fixture
def alone(monkeypatch):
    """The settings of torchrun for one process, which is left at the end."""
    settings = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("trainable", [["projector", "decoder"], ["vision_tower", "projector", "decoder"]])
def test_a_model_is_sharded_layer_by_layer(recipe_in, tmp_path, monkeypatch, alone, trainable):
    """So that a device need not hold all of it, nor the host a copy: what no unit has taken stays as it is on disk."""
    tiny.save(tiny.CASES["next"], tiny.hf_model(tiny.CASES["next"]).bfloat16(), tmp_path / "half")
    changes = {"model": str(tmp_path / "half"), "parallel": {"kind": "auto"}, "trainable": trainable}
    recipe = recipe_in(tmp_path / "run", **changes)
    world = join_world(recipe.parallel)
    model = load_model(recipe, world)
    layers = model.decoder.layers
    waiting = []

    def shard(unit, **options):
        waiting.append([layer[0].dtype for layer in map(list, map(nn.Module.parameters, layers))].count(torch.bfloat16))
        return fully_shard(unit, **options)

    monkeypatch.setattr(parallel, "fully_shard", shard)
    parallel.parallelize(model, recipe, world)
    assert waiting == [len(layers)] * (len(trainable) == 3) + [*reversed(range(len(layers))), 0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_frozen_weights_are_rounded_alike_however_they_are_placed(recipe_in, tmp_path, alone):
    """To the recipe's precision, from a checkpoint of a finer one: alone, sharded, and sharded after it was whole."""
    changes = {"precision": "bfloat16", "trainable": ["projector"], "parallel": {"kind": "fsdp2"}}
    recipe = recipe_in(tmp_path / "run", **changes)
    world, single = join_world(recipe.parallel), World(0, 1, torch.device("cpu"))
    unsharded, sharded, both = load_model(recipe, single), load_model(recipe, world), load_model(recipe, world)
    assert sharded.decoder.embed_tokens.weight.dtype == torch.float32
    assert weights_mark(sharded, recipe) == weights_mark(unsharded, recipe)
    parallel.place(both.parameters(), recipe, world)
    for model in (sharded, both):
        parallel.parallelize(model, recipe, world)
        found = dict(model.named_parameters())
        for name, expected in unsharded.named_parameters():
            whole = found[name].full_tensor() if isinstance(found[name], DTensor) else found[name]
            torch.testing.assert_close(whole.float(), expected.float(), rtol=0, atol=0, msg=name)


def test_kinds_that_do_not_fit_the_processes_are_refused(recipe_in, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="none is for one process, and there are 2"):
        join_world(recipe_in(tmp_path, parallel={"kind": "none"}).parallel)
    with pytest.raises(RecipeError, match="needs `fsdp2`, not `ddp`"):
        recipe_in(tmp_path, parallel={"kind": "ddp", "tensor": 2})


def test_processes_of_torchrun_end_with_it(recipe_in, tmp_path, monkeypatch, alone):
    """Only its own: one started from a shell may outlive that."""
    watched = []
    monkeypatch.setattr(parallel, "end_with_parent", lambda: watched.append(1))
    join_world(recipe_in(tmp_path).parallel)
    assert not watched
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    join_world(recipe_in(tmp_path).parallel)
    assert watched


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
    # The newest may not have got its name yet.
    assert RunCheckpoints(moved.output / "checkpoints", 1).steps()[0] in (2, 4)
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
    assert RunCheckpoints(killed.output / "checkpoints", 1).steps() == kept
    train(killed)
    assert losses(killed) == losses(small)
    assert [each.name for each in (killed.output / "checkpoints").iterdir()] == ["step-000005"]
