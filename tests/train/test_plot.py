"""Curves from metrics files: what is drawn of which run, and what is refused."""

import builtins
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from llava_fast.cli.main import app
from llava_fast.errors import DataError, TrainingError
from llava_fast.train.plot import CURVES, read_runs, save_curves

ORDINARY = ["loss", "lr", "gradient_norm", "tokens_per_second", "data_wait"]


def write_run(folder, name, steps=5, keys=ORDINARY, scale=1.0):
    (folder / name).mkdir(parents=True)
    lines = [{"step": step} | dict.fromkeys(keys, scale / step) | {"mfu": None} for step in range(1, steps + 1)]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    return folder / name


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1])
    return saved


def run(*arguments):
    return CliRunner().invoke(app, ["plot", *map(str, arguments)])


def test_runs_lie_over_each_other(tmp_path, figures):
    runs = [write_run(tmp_path, "one"), write_run(tmp_path, "two", steps=8, scale=2.0)]
    result = run(*runs, "-o", tmp_path / "out.png")
    assert result.exit_code == 0
    assert "out.png" in result.output
    assert min(Image.open(tmp_path / "out.png").size) > 300
    panels = [panel for panel in figures[0].axes if panel.get_visible()]
    assert [panel.get_title() for panel in panels] == [CURVES[key] for key in ORDINARY]
    for panel in panels:
        first, second = (line.get_xydata() for line in panel.lines)
        np.testing.assert_allclose(first, [(step, 1 / step) for step in range(1, 6)])
        np.testing.assert_allclose(second, [(step, 2 / step) for step in range(1, 9)])
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["one", "two"]


def test_rewards_where_present(tmp_path, figures):
    dpo = write_run(tmp_path, "dpo", steps=1, keys=[*ORDINARY, "reward_chosen", "reward_margin"])
    assert run(dpo, write_run(tmp_path, "ordinary")).exit_code == 0
    assert (dpo / "curves.png").exists()
    panels = {panel.get_title(): panel for panel in figures[0].axes if panel.get_visible()}
    assert list(panels) == [CURVES[key] for key in [*ORDINARY, "reward_chosen", "reward_margin"]]
    rewards = [line.get_ydata() for line in panels[CURVES["reward_margin"]].lines]
    assert rewards[0].tolist() == [1.0]
    assert np.isnan(rewards[1]).all()


def test_two_runs_of_one_name(tmp_path):
    paths = [write_run(tmp_path, "a/run"), write_run(tmp_path, "b/run")]
    assert list(read_runs(paths)) == [str(path) for path in paths]
    assert save_curves(read_runs(paths[:1]), tmp_path / "x.svg") == ORDINARY


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match=r"gone.* has no steps.*`output` directory"):
        read_runs([tmp_path / "gone"])
    made = write_run(tmp_path, "run")
    refused = run(made, "-o", tmp_path / "out.txt").exception
    assert isinstance(refused, DataError)
    assert "a picture of curves is a .png" in str(refused)
    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'llava_fast[plot]'" in str(run(made).exception)
