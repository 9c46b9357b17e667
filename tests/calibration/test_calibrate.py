"""GPTQ and AWQ by llm-compressor, which `make test-calibrate` installs in an environment of its own; else skipped."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

if importlib.util.find_spec("llmcompressor") is None:
    pytest.skip("needs llm-compressor: make test-calibrate", allow_module_level=True)

import llava_fast
from llava_fast import Quantisation, QuantisationError
from llava_fast.calibration import compressor
from llava_fast.cli.main import app
from llava_fast.models.quantised import Quantised, quantise_model
from tests.support import made_data, tiny

PROMPT = {"prompt": "<image> hello there", "images": [tiny.picture(60, 80)]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made_data.write_data(tmp_path_factory.mktemp("data"), samples=12)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def checkpoint(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny.save(tiny.CASES[name], tiny.pair(name).hf, made[name])
        return made[name]

    return checkpoint


def codes(model):
    return {name: module.codes for name, module in model.named_modules() if isinstance(module, Quantised)}


@torch.no_grad()
def logits(model, request=PROMPT):
    return model(model.prepare([request]), "all").logits


def error(model, request, exact):
    return float((logits(model, request) - exact).norm() / exact.norm())


DECODERS = ["next", "next_mistral_window", "next_qwen", "next_qwen3"]
GPTQ_ALONE = [
    "llava_opt",
    "llava_mpt",
    "llava_phi",
]  # llm-compressor knows none of AWQ's pairs of norm and Linears there


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in [*DECODERS, "next_stablelm"] for method in ("gptq", "awq")]
    + [(name, "gptq") for name in GPTQ_ALONE],
)
def test_every_decoder(name, method, checkpoints, data):
    """Every Linear that rounding to nearest quantises is quantised alike in form, to other codes."""
    model = llava_fast.load(checkpoints(name), device="cpu")
    exact = logits(model)
    found = codes(llava_fast.calibrate(model, data, "int4", method=method))
    nearest = codes(quantise_model(llava_fast.load(checkpoints(name), device="cpu"), "int4"))
    assert found.keys() == nearest.keys()
    for key, each in found.items():
        assert each.shape == nearest[key].shape
        if ".layers." in key:
            assert not torch.equal(each, nearest[key]), key
    assert error(model, PROMPT, exact) < 0.5


@pytest.mark.parametrize(
    "form",
    [
        Quantisation("int4", group=64, symmetric=False),
        Quantisation("int4", group=128),  # rows of 64: int8
        Quantisation("int8", tower="int8", embeddings="int8"),
    ],
    ids=["zero points", "uneven", "int8"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_read_again(form, dtype, checkpoints, data, tmp_path):
    model = llava_fast.load(checkpoints("next"), device="cpu", dtype=dtype)
    llava_fast.calibrate(model, data, form)
    llava_fast.save(model, tmp_path / "q")
    back = llava_fast.load(tmp_path / "q", device="cpu", dtype=dtype)
    assert codes(back).keys() == codes(model).keys()
    assert all(torch.equal(each, codes(back)[key]) for key, each in codes(model).items())
    assert torch.equal(logits(back), logits(model))
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"


@pytest.mark.parametrize("name", GPTQ_ALONE)
def test_decoders_that_awq_does_not_know(name, checkpoints, data):
    model = llava_fast.load(checkpoints(name), device="cpu")
    with pytest.raises(QuantisationError, match=r"cannot calibrate this \w+ decoder by AWQ: .*; use method gptq"):
        llava_fast.calibrate(model, data, method="awq")


def test_an_encoder_decoder_is_refused(checkpoints, data):
    model = llava_fast.load(checkpoints("blip2_t5"), device="cpu")
    with pytest.raises(QuantisationError, match="transformers has no t5 decoder"):
        llava_fast.calibrate(model, data)


def test_pictures_are_in_the_hessian(checkpoints, data, tmp_path):
    """Of two sets that differ in pixels alone, other codes come; of the same set, the same."""
    records = json.loads(data.read_text())
    for record in records:
        for name in [record["image"]] if isinstance(record.get("image"), str) else record.get("image") or []:
            size = Image.open(data.parent / name).size
            noise = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / name)
    load = lambda: llava_fast.load(checkpoints("next"), device="cpu")  # noqa: E731
    first, again = (codes(llava_fast.calibrate(load(), data)) for _ in range(2))
    other = codes(llava_fast.calibrate(load(), data, images=tmp_path))
    layers = [key for key in first if ".layers." in key]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert sum(torch.equal(first[key], other[key]) for key in layers) == 0


def test_the_command(checkpoints, data, tmp_path):
    asked = ["convert", str(checkpoints("next")), str(tmp_path / "out"), "--quantize", "int4", "--group", "64"]
    result = CliRunner().invoke(app, [*asked, "--calibrate", str(data), "--method", "awq", "--samples", "8"])
    assert result.exit_code == 0, result.output
    model = llava_fast.load(checkpoints("next"), device="cpu")
    llava_fast.calibrate(model, data, Quantisation("int4", group=64), method="awq", samples=8)
    assert torch.equal(logits(llava_fast.load(tmp_path / "out", device="cpu")), logits(model))


def test_another_decoder_is_refused(checkpoints, data, monkeypatch):
    """One whose transformers model computes something else, and one that llm-compressor fails on; weights stay."""
    model = llava_fast.load(checkpoints("next"), device="cpu")
    before = logits(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.config.decoder), "to_hf5", lambda self: self.to_hf() | {"rms_norm_eps": 1.0})
        with pytest.raises(QuantisationError, match="does not compute what this model's does"):
            llava_fast.calibrate(model, data)

    def fails(*_):
        raise RuntimeError("symbolically\ntraced")

    monkeypatch.setattr(compressor, "_recipe", fails)
    with pytest.raises(QuantisationError, match=r"this llama decoder by GPTQ: RuntimeError: symbolically traced$"):
        llava_fast.calibrate(model, data)
    assert torch.equal(logits(model), before)
