"""The demo model's training scripts and recipes: data that the trainer takes as it is, and stages that follow on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import llava_fast
from llava_fast.demo import KINDS, PHRASINGS, answer
from llava_fast.train.recipe import load_recipe
from llava_fast.train.run import train

pytest.importorskip("sklearn")
import make_data
import preferences
from make_model import make_model

RECIPES = Path(make_data.__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Untrained stage 0 and a few canvases, where the recipes look for them."""
    folder = tmp_path_factory.mktemp("demo") / "runs"
    make_model(folder / "digits/stage0")
    make_data.main(folder / "digits/data", easy=6, full=10, pairs=8, workers=1)
    return folder


def recipe(name: str, runs: Path, steps: int = 2):
    changes = ["batch_size=4", f"steps={steps}", "data.workers=0", "tensorboard=false"]
    made = load_recipe(RECIPES / f"{name}.yaml", changes)
    sources = [source.model_copy(update={"path": str(runs.parent / source.path)}) for source in made.data.sources]
    return made.model_copy(
        update={
            "model": str(runs.parent / made.model),
            "output": runs.parent / made.output,
            "data": made.data.model_copy(update={"sources": sources}),
        }
    )


def test_data_is_what_the_questions_ask(runs):
    for name, number, most in (("easy", 6, 2), ("full", 10, 5)):
        samples = json.loads((runs / f"digits/data/{name}.json").read_text())
        assert len(samples) == number
        for sample in samples:
            assert Image.open(runs / "digits/data" / sample["image"]).mode == "RGB"
            turns = [turn["value"] for turn in sample["conversations"]]
            questions = [turn.removeprefix("<image>\n") for turn in turns[::2]]
            asked = {
                next(kind for kind in KINDS if text in PHRASINGS[kind]): place for place, text in enumerate(questions)
            }
            assert asked.keys() == set(KINDS)
            assert turns[0].startswith("<image>\n")
            read = turns[2 * asked["read"] + 1]
            digits = [] if read == "none" else [int(digit) for digit in read.split()]
            assert len(digits) <= most
            assert all(turns[2 * place + 1] == answer(kind, digits) for kind, place in asked.items())


def test_canvases_do_not_depend_on_how_many_there_are(runs, tmp_path):
    (tmp_path / "images").mkdir()
    again = make_data.conversation(tmp_path, "full", make_data.FULL_SHARES, 3)
    assert again == json.loads((runs / "digits/data/full.json").read_text())[3]
    first, second = (Image.open(folder / again["image"]) for folder in (tmp_path, runs / "digits/data"))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_preferences_are_for_the_first_digit(runs):
    lines = (runs / "digits/data/preferences.jsonl").read_text().splitlines()
    assert len(lines) == 8
    for pair in map(json.loads, lines):
        assert [pair["chosen"]] == pair["rejected"].split()[:1] != pair["rejected"].split()


def test_stages_follow_on(runs):
    # Each recipe starts from what the one before it wrote.
    torch.manual_seed(0)
    start = llava_fast.load(runs / "digits/stage0", device="cpu").state_dict()
    first = llava_fast.load(train(recipe("stage1", runs)), device="cpu").state_dict()
    changed = {name for name in start if not torch.equal(start[name], first[name])}
    assert changed
    assert not any(name.startswith("vision_tower") for name in changed)
    second = llava_fast.load(train(recipe("stage2", runs)), device="cpu").state_dict()
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert any(name.startswith("vision_tower.encoder.layers.0.mlp") for name in moved)
    assert not any(".q_proj." in name or ".k_proj." in name for name in moved if name.startswith("vision_tower"))
    tuned = train(recipe("dpo", runs, steps=1))
    alone, right, _ = preferences.shares(llava_fast.load(tuned, device="cpu"), preferences.draw_canvases(3))
    assert 0 <= right <= alone <= 1
