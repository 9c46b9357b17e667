"""What `llava-fast doctor` says of accelerate is what accelerate does."""

import pytest

import llava_fast
from llava_fast.accelerated import patch
from llava_fast.accelerated import report as says
from llava_fast.doctor import report
from llava_fast.errors import CheckpointError
from tests.support.against_stock import batch, fresh


def saved(name: str, folder, **changes) -> str:
    """A directory that holds a config and nothing else."""
    config = fresh(name).config
    for field, value in changes.items():
        setattr(config, field, value)
    config.save_pretrained(folder)
    return str(folder)


def test_every_family_is_listed():
    lines = says.families()
    for name in patch.SUPPORTED:
        assert f"  {name}" in lines
    for what in patch.replaced(llava_fast.accelerate(fresh("next"))):
        assert lines.count(f"    {what}") == len(patch.SUPPORTED)


@pytest.mark.parametrize("name", ["llava15", "next", "video"])
def test_a_checkpoint_of_which_nothing_takes_the_stock_path(name, tmp_path, caplog):
    text = "\n".join(says.of_path(saved(name, tmp_path)))
    assert text.count("replaced: ") == len(patch.replaced(llava_fast.accelerate(fresh(name))))
    assert "stock, in each call: nothing" in text
    llava_fast.accelerate(fresh(name))(**batch(name, labels=True))
    assert not [record for record in caplog.records if "stock path" in record.message]


def test_what_takes_the_stock_path_and_why(tmp_path, caplog):
    text = "\n".join(says.of_path(saved("llava15", tmp_path, vision_feature_layer=[-2, -1])))
    why = "a list of feature layers is asked for ([-2, -1])"
    assert f"stock, in each call: the image path: {why}" in text
    model = llava_fast.accelerate(fresh("llava15_layers"))
    model(**batch("llava15_layers"))
    assert "a list of feature layers is asked for" in caplog.text


def test_a_live_model():
    model = fresh("next")
    assert not [line for line in says.of_model(model) if "replaced:" in line]
    llava_fast.accelerate(model)
    assert "stock, in each call: nothing" in "\n".join(says.of_model(model))
    model.lm_head.register_forward_hook(lambda *_: None)
    model.model.vision_tower.register_forward_hook(lambda *_: None)
    model.model.multi_modal_projector.linear_1.register_forward_hook(lambda *_: None)
    model.get_input_embeddings().register_forward_hook(lambda *_: None)
    text = "\n".join(says.of_model(model))
    for what in ("the loss: the output head is hooked", "the image path: the vision tower is hooked"):
        assert f"stock, in each call: {what}" in text
    assert "the projector runs its own forward" in text
    assert "the embedding runs its own forward" in text


def test_what_cannot_be_built_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    with pytest.raises(patch.UnsupportedModelError, match="does not support"):
        says.of_path(tmp_path)
    with pytest.raises(CheckpointError, match="transformers cannot build its model"):
        says.of_path(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="llava-fast convert"):
        says.of_path(saved("llava15", tmp_path / "original", mm_vision_tower="openai/clip"))


def test_the_doctor_prints_it(tmp_path):
    assert "accelerate(model) replaces" in report()
    of_one = report(saved("next", tmp_path))
    assert "accelerate on " in of_one
    assert "accelerate(model) replaces" not in of_one
