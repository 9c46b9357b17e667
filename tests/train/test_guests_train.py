"""Every family beyond LLaVA's own four through a recipe: the loss falls, and transformers reads what is exported."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

import llava_fast
from llava_fast.train.run import train
from tests.checkpoints.test_guests import GUESTS
from tests.support import tiny
from tests.support.training_runs import losses

PARTS = ("vision_tower", "projector", "decoder")


@pytest.mark.parametrize("name", GUESTS)
def test_it_trains_and_transformers_reads_what_is_exported(name, recipe_in, tmp_path):
    start = tmp_path / "start"
    tiny.save(tiny.CASES[name], tiny.pair(name).hf, start)
    optimizer = {"learning_rate": 2e-3}
    recipe = recipe_in(tmp_path / "run", model=str(start), trainable=list(PARTS), epochs=2, optimizer=optimizer)
    train(recipe)
    each = losses(recipe)
    assert sum(each[-2:]) < sum(each[:2]), each
    before, after = llava_fast.load(start), llava_fast.load(recipe.output / "model")
    for part in PARTS:
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        assert any(not torch.equal(old, new) for old, new in pairs), part
    stock, report = AutoModelForImageTextToText.from_pretrained(recipe.output / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pair = tiny.Pair(tiny.CASES[name], stock, tiny.pair(name).processor, after)
    request = {"prompt": "the <image> hello", "images": [tiny.picture(60, 90)]}
    with torch.no_grad():
        found = after(after.prepare([request]), logits="all").logits
        torch.testing.assert_close(found, stock(**pair.reference_inputs(**request)).logits[0], rtol=1e-4, atol=1e-4)
