"""Kills of all processes of a run at moments that nobody chose."""

import signal
import time

import numpy as np
import pytest

from llava_fast.train.metrics import FILE, read_metrics

KILLS = 10


def losses(recipe) -> list[float]:
    values = read_metrics(recipe.output / FILE)
    assert [each["step"] for each in values] == list(range(1, len(values) + 1))  # none missing, none twice
    return [each["loss"] for each in values]


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
