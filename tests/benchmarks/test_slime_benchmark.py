"""SliME's visual path beside its published steps, at a tiny width: both give the same rows, or nothing is printed."""

import pytest

from benchmarks import slime
from llava_fast.models.router import RouterConfig

SMALL = {"layers": 1, "width": 128, "size": (400, 300), "tokens": 5, "iters": 1, "warmup": 0.0}


def test_both_sides_are_measured():
    rows = slime.measure(**SMALL)
    assert [row["side"] for row in rows] == ["llava_fast", "published steps"]
    assert all(row["rows"] > 577 and row["error"] < 1e-4 and row["median"] > 0 for row in rows)


def test_a_difference_ends_it(monkeypatch):
    monkeypatch.setattr(slime, "RouterConfig", lambda _: RouterConfig(0.5))
    with pytest.raises(SystemExit, match=r"\d+ rows and \d+: there is nothing to compare"):
        slime.measure(**SMALL)
