"""The gate's table, and Linears merged into one: the same answers, names and checkpoints."""

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations

import llava_fast
from llava_fast.models.fused import MergedLinear, gate, merge_linears, separate_parameters, split_linears
from llava_fast.models.fused.norms import RMSNorm
from llava_fast.ops import backend, use_backend
from tests.support import tiny

NAMES = ["llava15", "next", "next_qwen", "next_mistral_window", "onevision", "next_biases"]
REQUESTS = [{"prompt": "<image>hello there", "images": [tiny.picture(60, 90)]}, {"prompt": "no picture"}]


# ---------------------------------------------------------------- the gate

LINEARS = {"linear": ("auto", "native"), "scaled_linear": ("auto",)}
"""Ops without a Triton kernel, which stand for no stock module, and what is asked for where they run on a CPU."""


@pytest.mark.parametrize("op", gate.RULES)
@pytest.mark.parametrize("chosen", backend.BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_an_op_stands_where_its_rule_says(op, chosen, autocast):
    x = torch.ones(2, 3)
    with use_backend(chosen), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        asked = LINEARS.get(op, ("triton",))
        assert gate.takes(op, x) == (chosen in asked and (gate.RULES[op].autocast or not autocast))


@pytest.mark.parametrize("op", gate.RULES)
def test_a_traced_graph_holds_what_the_rule_says(op):
    seen = []

    def run(x):
        seen.append(gate.takes(op, x))
        return x + 1

    for chosen in ("auto", "triton", "reference"):
        with use_backend(chosen):
            torch.compile(run, backend="eager")(torch.ones(2))
            torch.compiler.reset()
    assert seen == [gate.RULES[op].traced] * 3


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def watched(module):
    module.register_forward_pre_hook(lambda *_: None)
    return module


def replaced(module):
    module.forward = module.forward
    return module


def quantised(module):
    kind = type("Quantised", (nn.Parameter,), {})
    module.weight = module.weight.detach().as_subclass(kind).requires_grad_()
    return module


@pytest.mark.parametrize("change", [hooked, watched, replaced, quantised, parametrizations.weight_norm, nn.Sequential])
def test_a_module_that_is_not_as_built_runs_itself(change):
    x, changed = torch.ones(2, 4), change(nn.Linear(4, 4))
    with use_backend("triton"):
        assert gate.takes("linear_act", x, nn.Linear, nn.Linear(4, 4))
        assert not gate.takes("linear_act", x, nn.Linear, nn.Linear(4, 4), changed)


def test_operands_of_another_dtype_are_left():
    x = torch.ones(2, 4)
    with use_backend("triton"):
        assert gate.takes("assemble_inputs", x, operands=(x, x))
        assert not gate.takes("assemble_inputs", x, operands=(x, x.half()))


@pytest.mark.parametrize("op", sorted(gate.RULES.keys() - LINEARS.keys()))
def test_what_pays_against_transformers_modules_on_a_cpu(op):
    large, small = torch.ones(gate.LEAST), torch.ones(gate.LEAST - 1)
    assert gate.takes_for_stock(op, large) == gate.RULES[op].stock
    assert not gate.takes_for_stock(op, small)
    assert not gate.takes_for_stock(op, large.half())
    assert not gate.takes_for_stock(op, large.double())
    with use_backend("triton"):
        assert gate.takes_for_stock(op, small)
        assert not gate.takes_for_stock(op, small.double())
    with use_backend("reference"):
        assert not gate.takes_for_stock(op, large)


# ---------------------------------------------------------------- merged Linears


def merged_layers(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, MergedLinear)]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_merged_model_answers_the_same_under_the_same_names(name):
    model = copy.deepcopy(tiny.pair(name).ours)
    expected, batch = {k: v.clone() for k, v in model.state_dict().items()}, model.prepare(REQUESTS)
    logits = model(batch, logits="all").logits
    merge_linears(model)
    layers = model.config.vision.num_layers + 2 * model.config.decoder.num_layers
    assert len(merged_layers(model)) == layers
    torch.testing.assert_close(model(batch, logits="all").logits, logits, rtol=1e-5, atol=1e-5)
    for tensors in (model.state_dict(), separate_parameters(model)):
        found = {key: value for key, value in tensors.items() if key in expected}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    changed = {key: value + 1 for key, value in expected.items()}
    model.load_state_dict(changed)
    split_linears(model)
    assert not merged_layers(model)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, changed[key]) for key, value in model.state_dict().items())
    storages = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len(set(storages)) == len(storages)


def test_gradients_reach_a_merged_weight():
    model = copy.deepcopy(tiny.pair("next").ours)
    batch = model.prepare(
        [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]}], labels=True
    )
    expected = dict(zip(dict(model.named_parameters()), grads(model, batch), strict=True))
    merge_linears(model)
    names = list(dict(model.named_parameters()))
    found = dict(zip(names, grads(model, batch), strict=True))
    joined = torch.cat([expected[f"decoder.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    torch.testing.assert_close(found["decoder.layers.0.self_attn.qkv_proj.weight"], joined, rtol=1e-4, atol=1e-6)


def grads(model, batch):
    model.zero_grad(set_to_none=True)
    model(batch).loss.backward()
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("change", [hooked, replaced, quantised, parametrizations.spectral_norm, "bias", "frozen"])
def test_linears_that_differ_or_are_wrapped_stay_separate(change):
    attention = copy.deepcopy(tiny.pair("next").ours.vision_tower.encoder.layers[0].self_attn)
    if change == "bias":
        attention.q_proj.bias = None
    elif change == "frozen":
        attention.q_proj.requires_grad_(False)
    else:
        change(attention.q_proj)
    assert merge_linears(attention) is attention
    assert not merged_layers(attention)


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_saving_writes_separate_weights(layout, tmp_path):
    tiny.save(tiny.CASES["next"], tiny.hf_model(tiny.CASES["next"]), tmp_path / "stored")
    separate, merged = (llava_fast.load(tmp_path / "stored", merge=merge) for merge in (False, True))
    assert merged_layers(merged)
    assert not merged_layers(llava_fast.load(tmp_path / "stored"))
    for name, model in (("separate", separate), ("merged", merged)):
        llava_fast.save(model, tmp_path / name, layout=layout, max_shard_size="100KB")
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("separate", "merged")]
    stored = [dict(itertools.chain(*(load_file(file).items() for file in each))) for each in files]
    assert len(files[1]) > 1
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])
    answers = [model.generate(REQUESTS, max_new_tokens=8)[0].token_ids for model in (separate, merged)]
    assert answers[0] == answers[1]


def test_add_norm_takes_any_norm():
    x, change = torch.randn(3, 8), torch.randn(3, 8)
    for norm in (RMSNorm(8, 1e-6), nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.Identity()):
        for backend_name in ("auto", "triton"):
            with use_backend(backend_name), torch.no_grad():
                s, normed = llava_fast.models.fused.add_norm(x, change, norm)
                torch.testing.assert_close(s, x + change)
                torch.testing.assert_close(normed, norm(x + change), rtol=1e-5, atol=1e-5)
