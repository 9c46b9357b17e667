"""Visual paths beside their published steps, at a tiny width: both give the same rows, or nothing is printed."""

import pytest

from benchmarks import slime, uhd_first
from llava_fast.models.router import RouterConfig

SMALL = {"layers": 1, "width": 128, "size": (400, 300), "tokens": 5, "iters": 1, "warmup": 0.0}


@pytest.mark.parametrize(("suite", "least"), [(slime, 577), (uhd_first, 3 * 64)])
def test_both_sides_are_measured(suite, least):
    rows = suite.measure(**SMALL | {"width": 1024 if suite is uhd_first else 128})
    assert [row["side"] for row in rows] == ["llava_fast", "published steps"]
    assert all(row["rows"] > least and row["error"] < 1e-4 and row["median"] > 0 for row in rows)


def test_a_difference_ends_it(monkeypatch):
    monkeypatch.setattr(slime, "RouterConfig", lambda _: RouterConfig(0.5))
    with pytest.raises(SystemExit, match=r"\d+ rows and \d+: there is nothing to compare"):
        slime.measure(**SMALL)
