"""Kills at random moments: of all processes of a run, and of one worker, which torchrun restarts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.training_runs import losses

KILLS = 10


@pytest.fixture(scope="module")
def whole(recipe_in, tmp_path_factory):
    """A recipe for two processes."""
    return recipe_in(
        tmp_path_factory.mktemp("whole") / "whole",
        batch_size=2,
        steps=6,
        micro_batch_rows=700,
        recompute="none",
        parallel={"kind": "fsdp2"},
        checkpoints={"every": 2, "keep": 1},
    )


@pytest.mark.timeout(900)
def test_ten_kills_of_all_processes_at_random_moments(whole, run, tmp_path):
    def timed(recipe, **options) -> tuple[list[int], float]:
        started = time.monotonic()
        statuses = run(recipe, processes=2, **options)
        return statuses, time.monotonic() - started

    length = timed(whole)[1]
    rng = np.random.default_rng(0)
    kills = runs = 0
    while kills < KILLS:
        killed = whole.model_copy(update={"output": tmp_path / f"killed-{runs}"})
        runs += 1
        assert runs <= 2 * KILLS, "runs end before they are killed"
        statuses = [1]
        while any(statuses):  # killed again and again, until it ends before it is
            statuses, took = timed(killed, **({"after": rng.uniform(0, length)} if kills < KILLS else {}))
            assert set(statuses) <= {0, -signal.SIGKILL}, killed.output.with_suffix(".log").read_text()[-4000:]
            kills += any(statuses)
        length = min(length, took)
        assert losses(killed) == losses(whole)
        assert [each.name for each in (killed.output / "checkpoints").iterdir()] == ["step-000006"]
        assert {each.name for each in killed.output.iterdir()} == {each.name for each in whole.output.iterdir()}


def test_no_worker_outlives_its_main_process(recipe_in, run, tmp_path):
    """Which was killed while they write batches that nobody will read."""
    recipe = recipe_in(tmp_path / "run", batch_size=2, epochs=4, data={"workers": 3})
    assert run(recipe, kill="step:2", alone=True) == [-signal.SIGKILL, 0]


@pytest.mark.timeout(900)
def test_a_worker_that_dies_is_started_again(whole, tmp_path):
    """By torchrun, with the others; the run goes on from its newest checkpoint."""
    recipe = whole.model_copy(update={"output": tmp_path / "elastic", "steps": 40, "epochs": 4})
    path = tmp_path / "elastic.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "--max-restarts", "2", "-m", "llava_fast", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True) as agent:
        try:
            while agent.poll() is None and not list((recipe.output / "checkpoints").glob("step-*")):
                time.sleep(0.05)
            _first, second = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            os.kill(int(second), signal.SIGKILL)
            _, said = agent.communicate(timeout=240)
        finally:
            agent.terminate()  # it takes its workers, which are sessions of their own, along
    assert agent.returncode == 0, said[-4000:]
    assert "resumed after step" in said
    assert len(losses(recipe)) == 40
    assert (recipe.output / "model" / "config.json").exists()
