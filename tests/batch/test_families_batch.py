"""Families of their own layout in a batch: each answer is that of `generate`."""

import pytest

import llava_fast
from tests.batch.conftest import TOKENS, Held, answer, read
from tests.checkpoints import test_llama_vid, test_xcomposer


@pytest.mark.parametrize("family", [test_xcomposer, test_llama_vid])
def test_answers_are_those_of_generate(family, pictures, tmp_path):
    family.write(tmp_path / "model")
    model = llava_fast.load(tmp_path / "model")
    result = answer(Held(model=model), pictures, tmp_path / "out.jsonl", limit=3, prompt="what is it?")
    assert (result.rows, result.errors) == (3, 0)
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    for row in read(tmp_path / "out.jsonl"):
        asked = {"messages": [{"role": "user", "content": content}], "images": [str(pictures / row["id"])]}
        assert model.generate([asked], max_new_tokens=TOKENS)[0].text == row["answer"]
