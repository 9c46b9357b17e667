"""A family is one file and a line of the registry; what the generic code asks of it."""

import dataclasses
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import llava_fast
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.checkpoints.save import save
from llava_fast.errors import CheckpointError
from llava_fast.families import FAMILIES, family_of, find_family, writing_family
from llava_fast.families.names import NameMap, within
from llava_fast.inputs.chat.rendering import builtin_template
from llava_fast.models.vlm import LlavaModel
from llava_fast.ops.quantised_linear import packing
from tests.checkpoints import made_up_family
from tests.support import tiny
from tests.support.tiny_checkpoints import assert_same_tensors, build, edit_json, save_hf, write_original


@pytest.fixture
def made_up(monkeypatch):
    """The new file in families/, and its line."""
    monkeypatch.setitem(sys.modules, "llava_fast.families.made_up", made_up_family)
    monkeypatch.setitem(FAMILIES._entries, "made_up", "made_up:MadeUp")


@pytest.fixture
def checkpoint(made_up, tmp_path):
    """A made-up checkpoint, and its tensors under our names. Its config and files are written by the family."""
    case = tiny.CASES["llava15"]
    tiny.save(case, tiny.hf_model(case), tmp_path / "stock")
    stock = load_checkpoint(tmp_path / "stock").config
    vision, decoder = stock.vision, stock.decoder
    bridge = made_up_family.BridgeConfig(vision.feature_size, decoder.hidden_size, 1e-3)
    config = dataclasses.replace(stock, projector=bridge, model_type="made_up", source={})
    torch.manual_seed(0)
    model = LlavaModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.processor = dataclasses.replace(tiny.pair("llava15").ours.processor)
    save(model, tmp_path / "made_up")
    return tmp_path / "made_up", {name: value.detach() for name, value in model.named_parameters()}


def test_a_new_family_is_loaded_and_saved_to_the_bit(checkpoint, tmp_path):
    path, tensors = checkpoint
    written = json.loads((path / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("made_up", ["MadeUpForConditionalGeneration"])
    assert (written["bridge_eps"], "projector_hidden_act" in written) == (1e-3, False)
    stored = load_file(path / "model.safetensors")
    assert {"head.weight", "text.embed_tokens.weight", "link.bridge.bias", "link.pre_norm.weight"} <= stored.keys()
    assert all(name.startswith(("head.", "text.", "eye.", "link.")) for name in stored)
    assert json.loads((path / "processor_config.json").read_text())["processor_class"] == "MadeUpProcessor"

    model = llava_fast.load(path)
    assert isinstance(model.projector, made_up_family.Bridge)
    assert model.projector.norm.eps == 1e-3
    assert model.processor.template == builtin_template("llava_v1")
    assert_same_tensors(model, tensors)
    save(model, tmp_path / "again")
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (path / name).read_bytes(), name
    model.config = dataclasses.replace(model.config, source={})
    model.side_files = {}
    save(model, tmp_path / "by_hand")
    assert load_checkpoint(tmp_path / "by_hand").config == load_checkpoint(path).config


def test_a_new_family_answers(checkpoint):
    path, _ = checkpoint
    model = llava_fast.load(path)
    request = {"prompt": "the <image> hello", "images": [tiny.picture(60, 80)]}
    batch = model.prepare([request])
    with torch.no_grad():
        assert torch.isfinite(model(batch, logits="all").logits).all()
        other = model(model.prepare([request | {"images": [tiny.picture(60, 80, seed=1)]}]), logits="all").logits
    assert not torch.equal(model(batch, logits="all").logits, other)


def test_a_new_family_has_only_the_layouts_that_it_names(checkpoint, tmp_path):
    path, _ = checkpoint
    with pytest.raises(CheckpointError, match="made_up has no other layout than 'hf': save with layout='hf'"):
        save(build(load_checkpoint(path)), tmp_path / "b", layout="original")
    assert not (tmp_path / "b").exists()
    edit_json(path / "config.json", model_type="llava", projector_hidden_act="gelu")
    with pytest.raises(CheckpointError, match=r"has '\w+\.[\w.]+', which no supported LLaVA model has"):
        load_checkpoint(path)


def test_the_registry_and_the_families_agree():
    for model_type in FAMILIES:
        family = FAMILIES[model_type]()
        assert model_type in family.model_types
        assert family.model_types[0] in FAMILIES
        assert find_family({"model_type": model_type}).__class__ is type(family)
    assert find_family({"model_type": "llava", "mm_vision_tower": "x"}).layout == "original"
    for nothing in ({}, {"model_type": None}, {"model_type": []}, {"model_type": "gpt2"}):
        assert find_family(nothing) is None


def test_a_config_of_no_family_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: model_type is 'gpt2'; supported are llava, llava_next"):
        family_of({"model_type": "gpt2"}, tmp_path / "config.json")


def test_a_decoder_that_the_original_does_not_have_is_refused(tmp_path, monkeypatch):
    save_hf("llava", tmp_path / "a")
    model = build(load_checkpoint(tmp_path / "a"))
    monkeypatch.setattr(type(model.config.decoder), "original_type", None)
    with pytest.raises(CheckpointError, match="the original layout has no 'llama' decoder, only mistral, qwen2;"):
        save(model, tmp_path / "b", layout="original")


def test_each_layout_names_the_family_of_the_other(tmp_path):
    save_hf("llava_next", tmp_path / "a")
    config = load_checkpoint(tmp_path / "a").config
    assert [type(writing_family(config, layout)).__name__ for layout in ("hf", "original")] == [
        "LlavaNext",
        "LlavaOriginal",
    ]
    write_original(tmp_path / "b")
    config = load_checkpoint(tmp_path / "b").config
    assert [type(writing_family(config, layout)).__name__ for layout in ("hf", "original")] == [
        "Llava",
        "LlavaOriginal",
    ]


def test_rules_of_names():
    """The longest start counts in reading, the first rule in writing; a rule without a dot is a whole name."""
    names = NameMap(
        {"hf": (("decoder.lm_head.", "model.head."), ("decoder.", "model."), ("newline", "nl"))},
        read=(("vision_tower.", "model.eye."),),
    )
    for ours, stored in (("decoder.lm_head.weight", "model.head.weight"), ("decoder.x", "model.x"), ("newline", "nl")):
        assert (names.from_stored(stored), names.by_rules(ours, "hf")) == (ours, stored)
    assert names.from_stored("model.eye.x") == "vision_tower.x"
    assert names.from_stored("nl.x") is names.from_stored("other") is None
    with pytest.raises(CheckpointError, match="newlines"):
        names.by_rules("newlines", "hf")
    assert within({"layers.0": "linear_1"}, "projector.", "mm.") == (
        ("projector.layers.0.weight", "mm.linear_1.weight"),
        ("projector.layers.0.bias", "mm.linear_1.bias"),
        *((f"projector.layers.0.{name}", f"mm.linear_1.{name}") for name in packing.NAMES),
    )
