"""Adapters of a recipe: what they train, how a run goes on, and the two exports that must be one model."""

import json
import warnings

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import llava_fast
from llava_fast.cli.main import app
from llava_fast.errors import CheckpointError, RecipeError
from llava_fast.train import run as training
from llava_fast.train.parallel import World
from llava_fast.train.run import load_model, train
from tests.support.training_runs import SHAPES, break_off, losses

pytest.importorskip("peft")

ALONE = World(0, 1, torch.device("cpu"))
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def recipe(make_recipe):
    """Recipes with adapters of rank 4 beside a trained projector."""

    def make(**changes):
        lora = {"rank": 4, "alpha": 8} | changes.pop("lora", {})
        optimizer = {"learning_rate": 1e-2, "rates": {"projector": 2e-3}}
        return make_recipe(**{"lora": lora, "trainable": ["projector"], "optimizer": optimizer} | changes)

    return make


def same(first, second) -> bool:
    left, right = dict(first.named_parameters()), dict(second.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_learns_with_the_base_untouched_and_exports_one_model_twice(recipe):
    made = recipe(epochs=4)
    path = train(made)
    found = losses(made)
    assert found[-1] < 0.8 * found[0]
    base, merged = llava_fast.load(made.model), llava_fast.load(path, chat_template="vicuna_v1")
    now = dict(merged.named_parameters())
    changed = {name for name, old in base.named_parameters() if not torch.equal(old, now[name])}
    linears = tuple(f".{name}.weight" for name in ADAPTED)
    wanted = {name for name in now if name.startswith("decoder.") and name.endswith(linears)}
    assert changed == wanted | {name for name in now if name.startswith(("projector", "image_newline"))}

    adapter = made.output / "adapter"
    loaded = llava_fast.load(adapter, model_base=made.model, chat_template="vicuna_v1")
    assert sorted(file.name for file in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "llava_fast.json",
        "non_lora_trainables.bin",
    ]
    batch = merged.prepare([{"prompt": "USER: hello ASSISTANT:"}])
    with torch.no_grad():
        logits = [model(batch, logits="all").logits for model in (merged, loaded, base)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits[2], logits[0], rtol=1e-2, atol=1e-2)
    named = llava_fast.load(adapter)  # it names its base and its template
    assert same(named, loaded)
    assert named.processor.template.name == "vicuna_v1"
    stored = json.loads((adapter / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["peft_type"]) == (4, 8, "LORA")


def test_the_merged_model_is_the_one_that_was_trained(recipe):
    made = recipe(epochs=2)
    model = load_model(made, ALONE)
    trainer = training.build_trainer(made, model, ALONE)
    trainer.run()
    merged = llava_fast.load(trainer.export(), chat_template="vicuna_v1")
    batch = merged.prepare([{"prompt": "USER: hello ASSISTANT:"}])
    with torch.no_grad():
        torch.testing.assert_close(
            merged(batch, logits="all").logits, model.eval()(batch, logits="all").logits, rtol=1e-4, atol=1e-4
        )


def test_peft_reads_it_on_the_base_in_transformers(recipe):
    from peft import PeftModel
    from transformers import LlavaNextForConditionalGeneration

    made = recipe(steps=2)
    wanted = LlavaNextForConditionalGeneration.from_pretrained(train(made)).state_dict()
    base = LlavaNextForConditionalGeneration.from_pretrained(made.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        adapted = PeftModel.from_pretrained(base, made.output / "adapter")
    found = adapted.merge_and_unload().state_dict()
    others = torch.load(made.output / "adapter" / "non_lora_trainables.bin", weights_only=True)
    (name,) = others  # a parameter of no module, which PEFT cannot hold
    found["model.image_newline"] = others["base_model.model.model.image_newline"]
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_the_original_reads_it_beside_an_original_base(recipe, tiny_next, tmp_path):
    from safetensors.torch import load_file

    base = tmp_path / "base"
    llava_fast.save(llava_fast.load(tiny_next), base, layout="original")
    made = recipe(steps=1, model=str(base), layout="original")
    path, adapter = train(made), made.output / "adapter"
    assert same(llava_fast.load(path), llava_fast.load(adapter, model_base=base))
    factors = load_file(adapter / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in factors
    assert len(factors) == 2 * len(ADAPTED) * llava_fast.load(base).config.decoder.num_layers
    others = torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    assert {name.rpartition(".")[0] for name in others} == {
        "base_model.model.model",
        "base_model.model.model.mm_projector.0",
        "base_model.model.model.mm_projector.2",
    }
    assert json.loads((adapter / "config.json").read_text())["model_type"].startswith("llava_")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_trained_is_float32_and_drawn_by_the_seed(recipe, precision):
    made = recipe(precision=precision)
    first, again = load_model(made, ALONE), load_model(made, ALONE)
    torch.rand(3)  # what was drawn before does not count
    other = load_model(made.model_copy(update={"seed": 1}), ALONE)
    name = "decoder.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert same(first, again)
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    for name, parameter in first.named_parameters():
        trained = "lora_" in name or name.startswith(("projector", "image_newline"))
        assert parameter.requires_grad == trained, name
        assert parameter.dtype == (torch.float32 if trained else getattr(torch, precision)), name
    groups = training.build_trainer(made, first, ALONE).optimizer.param_groups
    assert {group["name"]: group["lr"] for group in groups} == {
        "decoder matrices": 1e-2,
        "projector matrices": 2e-3,
        "projector vectors": 2e-3,
    }


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_killed_run_goes_on_bit_for_bit(recipe, tmp_path, precision):
    whole = recipe(epochs=2, checkpoints={"every": 2}, lora={"dropout": 0.1}, precision=precision)
    train(whole)
    killed = whole.model_copy(update={"output": tmp_path / "killed"})
    break_off(killed, 3)
    train(killed)
    assert losses(killed) == losses(whole)
    assert same(*(llava_fast.load(each.output / "model") for each in (whole, killed)))


@pytest.mark.parametrize("shape", ["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one(recipe, run, tmp_path, shape):
    alone = recipe(batch_size=3, steps=5, micro_batch_rows=1, output=str(tmp_path / "alone"))
    train(alone)
    parallel = alone.parallel.model_copy(update=SHAPES[shape])
    shared = alone.model_copy(update={"output": tmp_path / shape, "parallel": parallel})
    run(shared, processes=2)
    np.testing.assert_allclose(losses(shared), losses(alone), rtol=1e-4)
    base = alone.model
    for path, options in (("model", {}), ("adapter", {"model_base": base})):
        one, two = (llava_fast.load(each.output / path, **options) for each in (alone, shared))
        for (name, value), other in zip(one.named_parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-2, atol=1e-3, msg=name)


def test_merge_lora(recipe, tmp_path):
    made = recipe(steps=1)
    path = train(made)
    command = ["merge-lora", str(made.output / "adapter"), str(tmp_path / "merged"), "--model-base", str(made.model)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'merged'} in the hf layout" in done.output
    merged, exported = llava_fast.load(tmp_path / "merged"), llava_fast.load(path)
    assert same(merged, exported)
    assert merged.processor.template.name == exported.processor.template.name
    done = CliRunner().invoke(app, ["merge-lora", str(made.model), str(tmp_path / "other")])
    assert isinstance(done.exception, CheckpointError)
    assert "no adapter to merge" in str(done.exception)


def test_adapters_that_cannot_be_had(recipe, monkeypatch):
    with pytest.raises(RecipeError, match=r"lora.targets: 'qkv' is not a Linear of the decoder; it has down_proj, "):
        load_model(recipe(lora={"targets": ["q_proj", "qkv"]}), ALONE)
    with pytest.raises(RecipeError, match=r"`lora` does not support `parallel.tensor`"):
        recipe(parallel={"kind": "fsdp2", "tensor": 2})
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(RecipeError, match=r"`lora` needs PEFT: pip install 'llava_fast\[train\]'"):
        load_model(recipe(), ALONE)
