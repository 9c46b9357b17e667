"""The model that ships reads held-out canvases as well as its card says, and the card is what was measured."""

import json

import evaluate
import numpy as np

import llava_fast
from llava_fast.demo import compose, split_scans
from llava_fast.demo.run import model_path

CANVASES = 80


def test_it_reads_as_well_as_its_card_says():
    """Three standard deviations of the share of so many canvases, at the recorded share, are allowed."""
    recorded = json.loads((model_path() / "evaluation.json").read_text())["results"]["whole image"]
    rng = np.random.default_rng(99)
    drawn = [compose(rng, split_scans()[1]) for _ in range(CANVASES)]
    found = evaluate.evaluate(llava_fast.load(model_path(), device="cpu"), drawn, None, None, "whole image")
    for kind in ("read", "count", "largest", "top_left"):
        share = recorded[kind]
        assert found[kind] >= share - 3 * (share * (1 - share) / CANVASES) ** 0.5 - 0.01, (kind, found[kind], share)


def test_the_card_holds_the_measured_table():
    report = json.loads((model_path() / "evaluation.json").read_text())
    card = (model_path() / "README.md").read_text()
    assert evaluate.table(report["results"]) in card
    assert f"{report['parameters']:,} parameters" in card
    assert f"on {report['canvases']} canvases" in card
