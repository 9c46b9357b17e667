"""The demo model in 8 and 4 bits: the committed result is within the bounds, and so are fewer canvases here."""

import json
from pathlib import Path

import quantised

LOST = {"int8": 0.003, "int4, groups of 32": 0.015}


def test_the_committed_result():
    report = json.loads(Path(quantised.__file__).with_name("quantised.json").read_text())
    assert report["canvases"] == 1000
    for name, most in LOST.items():
        assert report["results"]["float32"]["digits"] - report["results"][name]["digits"] <= most


def test_fewer_canvases():
    """A digit of so few canvases is half a point, so a digit more may be lost."""
    found = quantised.measure(40, seed=3)
    for name, most in LOST.items():
        assert found["float32"]["digits"] - found[name]["digits"] <= most + 0.01
