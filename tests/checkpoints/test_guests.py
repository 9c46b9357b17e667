"""Every family of transformers beyond LLaVA's own four: saved, read by both, written again, and errors for unsupported
settings. Logits, answers and gradients are in tests/test_parity_*, training in tests/train."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

import llava_fast
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.errors import CheckpointError, UnsupportedModelError
from llava_fast.integrations.processor import FastProcessor
from tests.support import tiny

GUESTS = (
    "internvl",
    "internvl_6b",
    "vipllava",
    "video_llava",
    "blip2",
    "blip2_t5",
    "instructblip",
    "instructblip_t5",
    "instructblipvideo",
    "idefics3",
    "smolvlm",
)
HOSTED = ("llava_mpt", "llava_opt", "llava_phi", "next_stablelm")  # decoders that transformers runs


@pytest.fixture(scope="module", params=GUESTS + HOSTED)
def guest(request, tmp_path_factory):
    """(name, transformers' checkpoint, what is saved of it here)."""
    stock, saved = (tmp_path_factory.mktemp(request.param) / part for part in ("stock", "saved"))
    tiny.save(tiny.CASES[request.param], tiny.pair(request.param).hf, stock)
    llava_fast.save(llava_fast.load(stock), saved)
    return request.param, stock, saved


def test_saved_it_is_read_by_both(guest):
    name, stock, saved = guest
    written, read = (json.loads((path / "config.json").read_text()) for path in (saved, stock))
    assert written | {"dtype": read["dtype"]} == read
    for file in ("preprocessor_config.json", "processor_config.json"):
        assert (saved / file).exists() == (stock / file).exists()
        assert not (saved / file).exists() or (saved / file).read_bytes() == (stock / file).read_bytes()
    again, report = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = tiny.pair(name).hf.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    ours = llava_fast.load(saved)
    assert ours.config == tiny.pair(name).ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), tiny.pair(name).ours.parameters(), strict=True))


def test_files_written_anew_describe_the_same_model(guest, tmp_path):
    name, stock, _ = guest
    model = llava_fast.load(stock)
    model.config, model.side_files = replace(model.config, source={}), {}
    llava_fast.save(model, tmp_path / "anew")
    ours, expected = load_checkpoint(tmp_path / "anew").config, load_checkpoint(stock).config
    assert replace(ours, eos_token_ids=(), pad_token_id=None) == replace(expected, eos_token_ids=(), pad_token_id=None)
    again, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "anew", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        inputs = tiny.pair(name).reference_inputs("the <image> hello", [tiny.picture(60, 90)])
        torch.testing.assert_close(again(**inputs).logits, tiny.pair(name).hf(**inputs).logits)


def test_it_has_no_other_layout(guest, tmp_path):
    if guest[0] in HOSTED:
        model_type, said = tiny.CASES[guest[0]].text.model_type, "the original layout has no"
        with pytest.raises(CheckpointError, match=f"{said} '{model_type}' decoder"):
            llava_fast.save(tiny.pair(guest[0]).ours, tmp_path / "original", layout="original")
        return
    model_type = tiny.CASES[guest[0]].kind
    with pytest.raises(CheckpointError, match=f"{model_type} has no other layout than 'hf'"):
        llava_fast.save(tiny.pair(guest[0]).ours, tmp_path / "original", layout="original")
    assert not (tmp_path / "original").exists()


@pytest.mark.parametrize("guest", GUESTS, indirect=True)
def test_what_does_not_serve_it_says_so(guest):
    name, stock, _ = guest
    with pytest.raises(UnsupportedModelError, match=f"does not support {type(tiny.pair(name).hf).__name__}"):
        llava_fast.accelerate(tiny.pair(name).hf)
    with pytest.raises(CheckpointError, match=f"is '{tiny.CASES[name].kind}': use transformers' AutoProcessor for it"):
        FastProcessor.from_pretrained(str(stock))
