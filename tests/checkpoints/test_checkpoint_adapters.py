"""Projector-only files over a base, and LoRA merged on load."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.errors import CheckpointError
from llava_fast.families.llava_names import to_stored
from tests.support.tiny_checkpoints import (
    ORIGINAL,
    assert_same_tensors,
    build,
    edit_json,
    edit_tensors,
    save_hf,
    write_original,
)

QUERY = "decoder.layers.0.self_attn.q_proj.weight"
UP = "decoder.layers.1.mlp.up_proj.weight"


def write_language_model(path, tensors):
    """The decoder alone, as a Llama repository has it."""
    path.mkdir()
    stored = {to_stored(name, "original"): t for name, t in tensors.items() if name.startswith("decoder.")}
    save_file(stored, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


def factors(rank=4, prefix="base_model.model."):
    """Random LoRA factors: ({stored name: tensor}, {our weight name: B @ A in float64})."""
    generator = torch.Generator().manual_seed(3)
    stored, products = {}, {}
    for name, rows, columns in ((QUERY, 16, 16), (UP, 24, 16)):
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        bare = prefix + to_stored(name, "original").removesuffix(".weight")
        stored |= {f"{bare}.lora_A.weight": a, f"{bare}.lora_B.weight": b}
        products[name] = b.double() @ a.double()
    return stored, products


def write_lora(path, stored, base=None, **changes):
    path.mkdir(parents=True, exist_ok=True)
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "base_model_name_or_path": base}
    (path / "adapter_config.json").write_text(json.dumps(adapter | changes))
    save_file(stored, path / "adapter_model.safetensors")


@pytest.mark.parametrize("file", ["mm_projector.bin", "mm_projector.safetensors"])
def test_a_projector_only_directory(tmp_path, file):
    tensors = write_original(tmp_path / "whole")
    base = write_language_model(tmp_path / "base", tensors)
    part = tmp_path / "part"
    part.mkdir()
    (tmp_path / "whole" / "tower").rename(part / "tower")
    tower = {
        n.replace("vision_tower", "vision_model", 1): t for n, t in tensors.items() if n.startswith("vision_tower")
    }
    save_file(tower, part / "tower" / "model.safetensors")
    (part / "config.json").write_text(json.dumps(ORIGINAL))
    stored = {to_stored(n, "original"): t for n, t in tensors.items() if n.startswith("projector.")}
    torch.save(stored, part / file) if file.endswith(".bin") else save_file(stored, part / file)

    checkpoint = load_checkpoint(part, model_base=base)
    assert_same_tensors(build(checkpoint), tensors)
    assert (checkpoint.path, checkpoint.tokenizer_path) == (part, base)
    with pytest.raises(CheckpointError, match="has only a projector; give model_base="):
        load_checkpoint(part)


@pytest.mark.parametrize("extra", ["base_model.model.", "", "module."])
def test_an_original_lora_directory(tmp_path, extra):
    """As the original trainer writes it: config.json, the adapter, and what else was trained."""
    tensors = write_original(tmp_path / "whole")
    stored, products = factors()
    lora = tmp_path / "lora"
    write_lora(lora, stored)
    (lora / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "tower").rename(lora / "tower")
    (tmp_path / "whole" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    trained = {name: torch.full_like(t, 0.5) for name, t in tensors.items() if name.startswith("projector.")}
    torch.save({extra + to_stored(n, "original"): t for n, t in trained.items()}, lora / "non_lora_trainables.bin")

    checkpoint = load_checkpoint(lora, model_base=tmp_path / "whole")
    merged = {name: (tensors[name].double() + 2 * products[name]).float() for name in products}
    model = build(checkpoint)
    parameters = dict(model.named_parameters())
    for name, wanted in merged.items():
        torch.testing.assert_close(parameters[name].data, wanted, rtol=1e-5, atol=1e-5)
        assert not torch.equal(parameters[name], tensors[name])
    assert_same_tensors(model, tensors | trained | {name: parameters[name].data for name in merged})


def test_lora_on_a_hugging_face_base_that_it_names(tmp_path):
    tensors = save_hf("llava", tmp_path / "base")
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(4, 16, generator=generator), torch.randn(16, 4, generator=generator)
    bare = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    lora = {f"{bare}.lora_A.weight": a, f"{bare}.lora_B.weight": b}
    write_lora(tmp_path / "lora", lora, base=str(tmp_path / "base"), use_rslora=True)
    checkpoint = load_checkpoint(tmp_path / "lora")
    assert checkpoint.path == tmp_path / "base"
    value = dict(build(checkpoint).named_parameters())[QUERY]
    torch.testing.assert_close(value.data, tensors[QUERY] + 8 / math.sqrt(4) * (b @ a), rtol=1e-6, atol=1e-6)


def test_merging_rounds_once(tmp_path):
    """A bfloat16 base gets the float32 sum rounded, not a rounded update added in bfloat16."""
    save_hf("llava", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    edit_tensors(file, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    base = load_file(file)["language_model.model.layers.0.self_attn.q_proj.weight"]
    stored, products = factors()
    write_lora(tmp_path / "lora", stored, base=str(tmp_path / "base"), lora_alpha=1)
    value = dict(build(load_checkpoint(tmp_path / "lora")).named_parameters())[QUERY].data
    exact = base.double() + products[QUERY] / 4
    assert value.dtype == torch.bfloat16
    assert (value.double() - exact).abs().max() <= (exact.bfloat16().double() - exact).abs().max() * 1.01
    twice_rounded = base + (products[QUERY] / 4).bfloat16()
    assert not torch.equal(value, twice_rounded)


def test_peft_reads_the_same_scale(tmp_path):
    """lora_alpha / r, as peft's LoraLayer.scaling; alpha 256 over rank 128 is the published LLaVA recipe."""
    tensors = save_hf("llava", tmp_path / "base")
    stored, products = factors(rank=2)
    write_lora(tmp_path / "lora", stored, base=str(tmp_path / "base"), r=2, lora_alpha=6)
    value = dict(build(load_checkpoint(tmp_path / "lora")).named_parameters())[UP].data
    torch.testing.assert_close(value.double(), tensors[UP].double() + 3 * products[UP], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": None}, "lacks r or lora_alpha"),
        ({"r": 2}, r"LoRA of decoder\..* has rank 4 and adapter_config.json states r 2"),
        ({"base_model_name_or_path": None}, "does not name their base; give model_base="),
    ],
)
def test_adapters_that_are_not_plain_lora(tmp_path, changes, message):
    save_hf("llava", tmp_path / "base")
    write_lora(tmp_path / "lora", factors()[0], base=str(tmp_path / "base"))
    edit_json(tmp_path / "lora" / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "lora")


def test_factors_that_do_not_fit(tmp_path):
    save_hf("llava", tmp_path / "base")
    lora, base = tmp_path / "lora", str(tmp_path / "base")
    prefix = "base_model.model.model.layers"

    write_lora(lora, {f"{prefix}.0.mlp.up_proj.lora_A.weight": torch.ones(4, 16)}, base)
    with pytest.raises(
        CheckpointError, match=r"lora_A of decoder\.layers\.0\.mlp\.up_proj\.weight without the other LoRA factor"
    ):
        load_checkpoint(lora)
    pair = {"lora_A.weight": torch.ones(4, 16), "lora_B.weight": torch.ones(25, 4)}
    write_lora(lora, {f"{prefix}.0.mlp.up_proj.{half}": t for half, t in pair.items()}, base)
    with pytest.raises(CheckpointError, match=r"is \[25, 4\] x \[4, 16\] and the base has shape \[24, 16\]"):
        load_checkpoint(lora)
    write_lora(lora, {f"{prefix}.9.mlp.up_proj.{half}": t for half, t in pair.items()}, base)
    with pytest.raises(CheckpointError, match="the base has no such tensor; give the base model"):
        load_checkpoint(lora)
    write_lora(lora, {"base_model.model.lm_head.lora_embedding_A": torch.ones(4, 16)}, base)
    with pytest.raises(CheckpointError, match="which is not a LoRA factor of a Linear"):
        load_checkpoint(lora)
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"but neither adapter_model.safetensors nor"):
        load_checkpoint(lora)


def test_model_base_for_a_whole_model_is_a_mistake(tmp_path):
    save_hf("llava", tmp_path)
    with pytest.raises(CheckpointError, match="is a whole model and does not use model_base"):
        load_checkpoint(tmp_path, model_base=tmp_path)
