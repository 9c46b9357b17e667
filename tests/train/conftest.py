"""A tiny LLaVA-format data set beside a tiny checkpoint, and recipes over them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llava_fast.train.recipe import Recipe, parse_recipe
from tests.support import tiny
from tests.support.made_data import write_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny_next(tmp_path_factory) -> Path:
    """A tiny LLaVA-NeXT checkpoint directory."""
    folder = tmp_path_factory.mktemp("tiny_next")
    tiny.save(tiny.CASES["next"], tiny.hf_model(tiny.CASES["next"]), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data.json of 22 mixed samples."""
    return write_data(tmp_path_factory.mktemp("tiny_data"))


@pytest.fixture(scope="session")
def recipe_in(tiny_next, tiny_data):
    """Recipes over the tiny checkpoint and data with an output directory; keywords replace top-level fields, `data` and
    `optimizer` add to theirs."""

    def make(output: Path, /, **changes) -> Recipe:
        data = {
            "sources": [{"path": str(tiny_data), "images": str(tiny_data.parent)}],
            "template": "vicuna_v1",
            "workers": 0,
        } | changes.pop("data", {})
        optimizer = {"learning_rate": 1e-3, "warmup": 0.0} | changes.pop("optimizer", {})
        given = {
            "model": str(tiny_next),
            "output": str(output),
            "trainable": ["projector", "decoder"],
            "data": data,
            "optimizer": optimizer,
            "batch_size": 8,
            "precision": "float32",
            "tensorboard": False,
        }
        return parse_recipe(given | changes)

    return make


@pytest.fixture
def make_recipe(recipe_in, tmp_path):
    """`recipe_in` a directory of the test's own."""
    return lambda **changes: recipe_in(tmp_path / "run", **changes)


@pytest.fixture(scope="session")
def _launcher():
    command = [sys.executable, "-m", "tests.support.processes"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:
        yield process
        process.kill()


@pytest.fixture
def run(_launcher):
    """Runs a recipe (`llava-fast train`) in processes of its own that may be killed: see processes.py.
    Returns their exit statuses, and fails if one is not 0 where nothing was to be killed."""

    def launch(recipe: Recipe, processes: int = 1, **options) -> list[int]:
        path, log = recipe.output.with_suffix(".yaml"), recipe.output.with_suffix(".log")
        path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        log.unlink(missing_ok=True)
        request = {"recipe": str(path), "log": str(log), "processes": processes, **options}
        print(json.dumps(request), file=_launcher.stdin, flush=True)
        statuses = json.loads(_launcher.stdout.readline())
        assert options or not any(statuses), log.read_text()[-4000:]
        return statuses

    return launch
