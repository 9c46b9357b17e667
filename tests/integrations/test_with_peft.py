"""LoRA (PEFT) on an accelerated model, before and after accelerate, against LoRA on the stock model."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

import llava_fast
from llava_fast.accelerated import patch
from llava_fast.models import encode
from llava_fast.ops import assemble_inputs
from tests.support import tiny
from tests.support.against_stock import assert_same_gradients, assert_same_outputs, batch, fresh, gradients
from tests.support.parity import assert_same_answer

DECODER = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
SETTINGS = {
    "decoder": {"target_modules": DECODER},
    "projector": {"target_modules": ["linear_1", "linear_2"]},
    "all": {"target_modules": "all-linear"},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "patch_embedding"]},
    "whole parts": {"target_modules": DECODER, "modules_to_save": ["multi_modal_projector", "embed_tokens", "lm_head"]},
    "new tokens": {"target_modules": DECODER, "trainable_token_indices": [1, 2, tiny.IMAGE_ID]},
    "dora": {"target_modules": ["q_proj", "linear_2"], "use_dora": True},
}
FIRST = pytest.mark.parametrize("first", ["accelerate", "peft"])


def with_lora(model: nn.Module, setting: str = "all", **options) -> nn.Module:
    """The same random adapter each time; a part that is trained whole differs from the one it came from."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **SETTINGS[setting], **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.mul_(1.1)
    return wrapped


def both(first: str, setting: str = "all", name: str = "next", **options) -> tuple[nn.Module, nn.Module]:
    """(stock with LoRA, accelerated with LoRA)."""
    stock = with_lora(fresh(name), setting, **options)
    if first == "accelerate":
        return stock, with_lora(llava_fast.accelerate(fresh(name)), setting, **options)
    return stock, llava_fast.accelerate(with_lora(fresh(name), setting, **options))


@pytest.fixture
def fused(first, monkeypatch) -> list:
    """PEFT first: projector and placement are taken as one op, as where a kernel serves it. The calls of that op."""
    taken: list = []
    monkeypatch.setattr(encode, "takes", lambda *_, **__: first == "peft")
    monkeypatch.setattr(encode, "assemble_inputs", lambda *a: taken.append(1) or assemble_inputs(*a))
    return taken


@pytest.mark.parametrize("setting", SETTINGS)
@FIRST
def test_loss_and_gradients(first, setting, fused):
    stock, model = both(first, setting)
    for inputs in (batch("next", labels=True), batch("next", "none", labels=True)):
        assert_same_outputs(model, stock, inputs)
        if setting == "projector" and "pixel_values" not in inputs:
            continue  # nothing has a gradient
        found, expected = gradients(model, inputs)[1], gradients(stock, inputs)[1]
        assert any(part is not None for part in expected.values())
        assert_same_gradients("accelerated gradients, LoRA", found, expected)
    assert not fused or setting in ("decoder", "embedding and head", "new tokens")  # else the projector is wrapped


@pytest.mark.parametrize("setting", ["decoder", "projector", "all"])
def test_the_fast_paths_are_taken(setting, no_fallback):
    stock, model = both("peft", setting)
    assert_same_outputs(model, stock, batch("next", labels=True))


@pytest.mark.parametrize("setting", ["all", "whole parts", "new tokens"])
@FIRST
def test_disabled_merged_and_unloaded(first, setting, fused):
    stock, model = both(first, setting)
    inputs = batch("next", labels=True)
    with stock.disable_adapter(), model.disable_adapter():
        assert_same_outputs(model, stock, inputs)
        assert_same_outputs(model, fresh("next"), inputs)
    assert_same_outputs(model, stock, inputs)
    stock.merge_adapter()
    model.merge_adapter()
    assert_same_outputs(model, stock, inputs)
    stock.unmerge_adapter()
    model.unmerge_adapter()
    merged, expected = model.merge_and_unload(), stock.merge_and_unload()
    assert patch.replaced(merged)
    assert_same_outputs(merged, expected, inputs)
    for each in (merged, expected):
        each.requires_grad_(True)
    assert_same_gradients("gradients, merged", gradients(merged, inputs)[1], gradients(expected, inputs)[1])


def test_two_adapters():
    models = both("accelerate")
    for model in models:
        torch.manual_seed(2)
        model.add_adapter("other", peft.LoraConfig(r=3, init_lora_weights=False, **SETTINGS["projector"]))
        model.set_adapter("other")
    assert_same_outputs(models[1], models[0], batch("next", labels=True))


@FIRST
def test_save_and_load(first, tmp_path):
    stock, model = both(first)
    stock.save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "ours")
    weights = [(tmp_path / side / "adapter_model.safetensors").read_bytes() for side in ("stock", "ours")]
    assert weights[0] == weights[1]
    loaded = peft.PeftModel.from_pretrained(llava_fast.accelerate(fresh("next")), tmp_path / "ours")
    assert_same_outputs(loaded, stock, batch("next"))
    assert_same_outputs(peft.PeftModel.from_pretrained(fresh("next"), tmp_path / "ours"), model, batch("next"))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert_same_outputs(merged, stock, batch("next"))


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@FIRST
def test_generate(first, task, no_fallback):
    models = both(first, "all", task_type=task)
    inputs, answers = batch("next"), []
    for model in models:
        for _ in range(2):  # a second time, for what PEFT leaves behind
            out = model.generate(
                **inputs,
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        answers.append(out.sequences[:, inputs["input_ids"].shape[1] :].tolist())
    for row, (expected, found) in enumerate(zip(*answers, strict=True)):
        assert_same_answer(found, expected, torch.stack(out.logits)[:, row])


def test_restore_and_copies():
    stock, model = both("accelerate")
    twin = copy.deepcopy(model)
    inputs = batch("next", labels=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_outputs(twin, stock, inputs)
    llava_fast.restore(twin)
    assert patch.replaced(twin) == []
    assert_same_outputs(twin, stock, inputs)
