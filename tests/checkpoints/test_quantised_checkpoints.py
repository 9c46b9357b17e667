"""Quantised checkpoints: loaded as they are read, saved as compressed-tensors, read by it and by transformers."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import llava_fast
from llava_fast import CheckpointError, Quantisation
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.models.quantised import quantise_model
from llava_fast.ops import use_backend
from tests.support import tiny

KINDS = {
    "int8": Quantisation("int8"),
    "int8 groups": Quantisation("int8", group=64),
    "int4": Quantisation("int4"),
    "int4 uneven": Quantisation("int4", group=128),
    "int4 zeros": Quantisation("int4", group=64, symmetric=False),
    "everything": Quantisation("int4", embeddings="int8", tower="int8", projector="int8"),
}
of_every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
PROMPT, PICTURE = "<image> hello there", tiny.picture(60, 80)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    tiny.save(tiny.CASES["next"], tiny.pair("next").hf, path)
    return path


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@of_every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_quantises_as_quantising_does(checkpoint, kind, dtype):
    loaded = llava_fast.load(checkpoint, quantize=kind, dtype=dtype)
    whole = quantise_model(llava_fast.load(checkpoint, dtype="float32"), kind).to(getattr(torch, dtype))
    same(state_of(loaded), state_of(whole))
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}


@of_every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_read_again(checkpoint, tmp_path, kind, dtype):
    model = llava_fast.load(checkpoint, quantize=kind, dtype=dtype)
    llava_fast.save(model, tmp_path / "q")
    back = llava_fast.load(tmp_path / "q", dtype=dtype)
    same(state_of(model), state_of(back))
    assert llava_fast.load(tmp_path / "q", dtype="auto").decoder.dtype == getattr(torch, dtype)
    request = {"prompt": PROMPT, "images": [PICTURE]}
    assert [model.generate([request], max_new_tokens=4)] == [back.generate([request], max_new_tokens=4)]
    scales = {name: t.dtype for name, t in load_file(tmp_path / "q" / "model.safetensors").items() if "scale" in name}
    assert set(scales.values()) == {getattr(torch, dtype)}  # rounded up to bfloat16, so 16 bits hold them


def test_the_config_says_what_is_left(checkpoint, tmp_path):
    model = llava_fast.load(checkpoint, quantize=Quantisation("int4", group=128, head=None))
    llava_fast.save(model, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    by_bits = {group["weights"]["num_bits"]: group for group in config["config_groups"].values()}
    assert list(by_bits[4]["targets"]) == [
        (
            r"re:(language_model\.model\.layers\.\d+\.mlp\.down_proj|"
            r"model\.language_model\.layers\.\d+\.mlp\.down_proj)$"
        )
    ]
    assert (by_bits[4]["weights"]["group_size"], by_bits[8]["weights"]["strategy"]) == (128, "channel")
    assert len(by_bits[8]["targets"]) == 6
    ignored = " ".join(config["ignore"])
    assert "lm_head" in ignored
    assert "vision_tower" in ignored
    assert "multi_modal_projector" in ignored


def test_a_model_that_is_dense_again_has_no_quantisation(checkpoint, tmp_path):
    llava_fast.save(llava_fast.load(checkpoint, quantize="int8"), tmp_path / "q")
    model = llava_fast.load(tmp_path / "q")
    for name, module in list(model.named_modules()):
        if hasattr(module, "dense"):
            parent, _, leaf = name.rpartition(".")
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = torch.nn.Parameter(module.dense())
            setattr(model.get_submodule(parent), leaf, linear)
    llava_fast.save(model, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_shards_hold_whole_weights(checkpoint, tmp_path):
    model = llava_fast.load(checkpoint, quantize="int4")
    llava_fast.save(model, tmp_path / "q", max_shard_size=100_000)
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 2
    same(state_of(model), state_of(llava_fast.load(tmp_path / "q")))


def test_an_original_one_is_converted_with_its_new_tokens(tmp_path):
    """The vocabulary grows by rows that are the mean of the others, in head and embedding."""
    from types import SimpleNamespace

    from tests.support.tiny_checkpoints import build, tokenizer, write_original

    write_original(tmp_path / "o")
    options = Quantisation("int8", embeddings="int8")
    model = quantise_model(build(load_checkpoint(tmp_path / "o")), options)
    model.processor = SimpleNamespace(tokenizer=tokenizer(size=96))
    with pytest.raises(CheckpointError, match="layout 'original' does not support quantised weights"):
        llava_fast.save(model, tmp_path / "q", layout="original")
    llava_fast.save(model, tmp_path / "q", layout="hf")
    table = load_file(tmp_path / "q" / "model.safetensors")["language_model.model.embed_tokens.weight_packed"]
    assert len(table) > model.decoder.embed_tokens.codes.shape[0]


@of_every_kind
def test_compressed_tensors_reads_the_same_weights(checkpoint, tmp_path, kind):
    package = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    model = llava_fast.load(checkpoint, quantize=kind)
    llava_fast.save(model, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    stored, seen = load_file(tmp_path / "q" / "model.safetensors"), 0
    for name in [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]:
        fitting = [g for g in groups if any(package.utils.match_name(name, target) for target in g.targets)]
        assert len(fitting) == 1, name
        parts = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
        reader = BaseCompressor.get_value_from_registry(fitting[0].format)
        found = reader.decompress(parts, fitting[0])["weight"]
        from llava_fast.families.llava_names import from_stored

        mine = model.get_submodule(from_stored(f"{name}.weight").removesuffix(".weight"))
        torch.testing.assert_close(found, mine.dense(), rtol=1e-6, atol=1e-7)
        seen += 1
    assert seen >= 21


@pytest.mark.parametrize("kind", [KINDS["int8"], KINDS["int4"], KINDS["int4 uneven"]], ids=["int8", "int4", "uneven"])
def test_transformers_answers_the_same(checkpoint, tmp_path, kind):
    """Logits within 1e-5 of their norm, in float32, with the products of the reference: neither side rounds inputs."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForImageTextToText

    model = llava_fast.load(checkpoint, quantize=kind)
    llava_fast.save(model, tmp_path / "q")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "q", dtype=torch.float32).eval()
    pair = tiny.Pair(tiny.CASES["next"], theirs, tiny.hf_processor(tiny.CASES["next"]), model)
    with torch.no_grad(), use_backend("reference"):
        expected = theirs(**pair.reference_inputs(PROMPT, [PICTURE])).logits[0]
        found = model(model.prepare([{"prompt": PROMPT, "images": [PICTURE]}]), logits="all").logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_quantised_checkpoint_is_not_quantised_again(checkpoint, tmp_path):
    llava_fast.save(llava_fast.load(checkpoint, quantize="int8"), tmp_path / "q")
    with pytest.raises(CheckpointError, match="is quantised already: leave quantize out"):
        llava_fast.load(tmp_path / "q", quantize="int4")


def test_weights_that_are_not_finite_are_named(tmp_path):
    hf = tiny.hf_model(tiny.CASES["next"])
    with torch.no_grad():
        hf.model.language_model.layers[1].mlp.up_proj.weight[0, 0] = np.nan
    tiny.save(tiny.CASES["next"], hf, tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight': the weight to quantise holds values"):
        llava_fast.load(tmp_path, quantize="int4")


def test_convert(checkpoint, tmp_path):
    from typer.testing import CliRunner

    from llava_fast.cli.main import app

    given = ["convert", str(checkpoint), str(tmp_path / "q"), "--quantize", "int4", "--group", "64", "--zero-points"]
    run = CliRunner().invoke(app, given)
    assert run.exit_code == 0, run.output
    assert "read: 100%" in run.output
    expected = llava_fast.load(checkpoint, quantize=Quantisation("int4", 64, False), dtype="float32")
    same(state_of(expected), state_of(llava_fast.load(tmp_path / "q")))
    before = (tmp_path / "q" / "config.json").stat()
    again = CliRunner().invoke(app, given)
    assert "is not empty; choose another directory" in str(again.exception)
    assert (tmp_path / "q" / "config.json").stat() == before
    alone = CliRunner().invoke(app, ["convert", str(checkpoint), str(tmp_path / "r"), "--group", "64"])
    assert "--group and --zero-points need --quantize" in str(alone.exception)
    early = CliRunner().invoke(
        app, ["convert", str(checkpoint), str(tmp_path / "r"), "--quantize", "int4", "--layout", "original"]
    )
    assert "layout 'original' does not support quantised weights" in str(early.exception)
    assert "read:" not in early.output  # before any weight is
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
