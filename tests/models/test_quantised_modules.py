"""Quantised modules: which modules of a model are replaced; moving, casting, storing and training around them."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import llava_fast
from llava_fast import Quantisation, QuantisationError
from llava_fast.models.fused import MergedLinear, merge_linears
from llava_fast.models.quantised import Quantised, QuantisedEmbedding, QuantisedLinear, quantise_model
from llava_fast.ops import use_backend
from llava_fast.ops.decoder_step import native
from llava_fast.ops.quantised_linear import dequantise, quantise
from tests.support import tiny

PICTURE = tiny.picture(60, 80)
REQUEST = {"prompt": "<image> hello there", "images": [PICTURE]}


def model_of(name="next"):
    return copy.deepcopy(tiny.pair(name).ours)


def kinds(model):
    return {
        name: (module.quantised.scheme, module.quantised.group)
        for name, module in model.named_modules()
        if isinstance(module, Quantised)
    }


def logits_of(model, request=REQUEST):
    with torch.no_grad():
        return model(model.prepare([request]), logits="all").logits


def linear(scheme="int4", group=32, symmetric=True, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    made = nn.Linear(64, 24, bias=bias, dtype=dtype)
    return made, QuantisedLinear(quantise(made.weight.detach(), scheme, group, symmetric), made.bias, dtype)


@pytest.mark.parametrize("scheme", [("int8", None, True), ("int4", 32, True), ("int4", 64, False)], ids=str)
def test_a_linear_is_its_dequantised_weight(scheme):
    _, quantised = linear(*scheme)
    x = torch.randn(5, 64)
    expected = F.linear(x, dequantise(quantised.quantised), quantised.bias)
    torch.testing.assert_close(quantised(x), expected)
    torch.testing.assert_close(F.linear(x, quantised.dense(), quantised.bias), expected)


@pytest.mark.parametrize("scheme", [("int8", None, True), ("int4", 32, True), ("int4", 64, False)], ids=str)
def test_a_state_dict_comes_back(scheme):
    _, first = linear(*scheme)
    _, other = linear(*scheme)
    other.codes, other.scale = torch.zeros_like(other.codes), torch.ones_like(other.scale)
    state = {name: tensor.clone() for name, tensor in nn.ModuleDict({"a": first}).state_dict().items()}
    assert set(state) - {"a.bias"} == {f"a.{name}" for name in first.stored()}
    assert nn.ModuleDict({"a": other}).load_state_dict(state) == ([], [])
    x = torch.randn(3, 64)
    assert torch.equal(other(x), first(x))
    del state["a.weight_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*a\.weight_scale"):
        nn.ModuleDict({"a": other}).load_state_dict(state)
    state["a.weight_scale"], state["a.weight_packed"] = first.scale, state["a.weight_packed"][:, :-1]
    with pytest.raises(RuntimeError, match=r"a: weight_packed torch.int32 .* does not hold \[24, 64\]"):
        nn.ModuleDict({"a": other}).load_state_dict(state)


def test_casting_rounds_no_scale():
    _, quantised = linear()
    quantised.scale.add_(1e-4)  # not a value of bfloat16
    scale = quantised.scale.clone()
    quantised.to(torch.bfloat16)
    assert (quantised.dtype, quantised.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(quantised.scale, scale)
    assert quantised(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    quantised.double()
    assert (quantised.dtype, quantised.scale.dtype) == (torch.float64, torch.float32)
    assert torch.equal(quantised.scale, scale)
    moved = copy.deepcopy(quantised).to("meta")
    assert moved.codes.is_meta
    assert moved.scale.is_meta


def test_an_embedding_gives_rows_in_its_dtype():
    table = torch.randn(10, 64)
    embedding = QuantisedEmbedding(quantise(table, "int8"), torch.bfloat16)
    ids = torch.tensor([[3, 9], [0, 3]])
    assert embedding(ids).dtype == torch.bfloat16
    torch.testing.assert_close(embedding(ids).float(), table[ids], atol=0.03, rtol=0.01)
    hidden = torch.randn(2, 64)
    with use_backend("reference"):
        torch.testing.assert_close(embedding.project(hidden), hidden @ embedding.dense(torch.float32).T)


def test_an_order_of_columns_is_of_the_input():
    made, _ = linear()
    order = torch.randperm(64)
    quantised = QuantisedLinear(quantise(made.weight.detach()[:, order], "int4", 32), made.bias, order=order)
    x = torch.randn(3, 64)
    torch.testing.assert_close(quantised(x), F.linear(x, quantised.dense(), made.bias))
    assert (quantised.dense() - made.weight).abs().max() < 0.02
    with pytest.raises(QuantisationError, match="act-order"):
        quantised.state_dict()


def test_what_is_quantised_by_default():
    """The decoder's Linears and the head; the embedding, tower, projector and norms are left."""
    found = kinds(quantise_model(model_of(), "int4"))
    assert found.pop("decoder.lm_head") == ("int8", 64)
    assert len(found) == 3 * 7
    assert set(found.values()) == {("int4", 32)}
    assert all(name.startswith("decoder.layers.") for name in found)


@pytest.mark.parametrize(
    ("options", "module", "scheme"),
    [
        ({"embeddings": "int8"}, "decoder.embed_tokens", ("int8", 64)),
        ({"tower": "int8"}, "vision_tower.encoder.layers.0.mlp.fc1", ("int8", 32)),
        ({"projector": "int8"}, "projector.layers.0", ("int8", 32)),
        ({"group": 64, "symmetric": False}, "decoder.layers.0.mlp.up_proj", ("int4", 64)),
        ({"scheme": "int8"}, "decoder.layers.0.mlp.down_proj", ("int8", 128)),
        ({"scheme": "int8", "group": 32}, "decoder.layers.0.mlp.down_proj", ("int8", 32)),
    ],
    ids=str,
)
def test_options(options, module, scheme):
    model = quantise_model(model_of(), Quantisation(**options))
    assert kinds(model)[module] == scheme
    assert model.generate([REQUEST], max_new_tokens=2)[0].token_ids


def test_a_group_that_does_not_divide_leaves_int8_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, "llava_fast.quantised"):
        found = kinds(quantise_model(model_of(), Quantisation("int4", group=128)))
    assert found["decoder.layers.0.mlp.down_proj"] == ("int4", 128)
    assert found["decoder.layers.0.mlp.up_proj"] == ("int8", 64)
    assert "group 128 does not divide the rows of decoder.layers.0.self_attn.q_proj (64)" in caplog.text
    assert "and 14 more: int8 with a scale for each row" in caplog.text


@pytest.mark.parametrize("embeddings", ["int8", None])
def test_a_tied_head(embeddings):
    model = quantise_model(model_of("onevision"), Quantisation("int8", embeddings=embeddings))
    assert ("decoder.embed_tokens" in kinds(model)) == (embeddings is not None)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    batch = model.prepare([{"messages": turns}], labels=True)
    with torch.no_grad():
        loss, without = model(batch).loss, model(batch, logits="none").loss
    torch.testing.assert_close(loss, without)
    assert model.generate([REQUEST], max_new_tokens=2)[0].token_ids


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_logits_stay_within_the_rounding_of_all_weights(scheme):
    """Against float64: each Linear's relative error (of its weights, root mean square) is independent of the others',
    so that of the logits is at most the root of the sum of their squares. (The rounding of inputs, which the native
    form adds, is tests/ops/test_quantised_native.py's.)"""
    exact, model = model_of().double(), quantise_model(model_of(), scheme)
    squares = 0.0
    for name in kinds(model):
        weight = exact.get_submodule(name).weight
        squares += ((model.get_submodule(name).dense(torch.float64) - weight).norm() / weight.norm()).item() ** 2
    expected = logits_of(exact)
    with use_backend("reference"):
        found = logits_of(model)
    assert (found - expected).norm() <= squares**0.5 * expected.norm()


def test_merged_linears_are_split_and_stay_so():
    model = merge_linears(model_of())
    quantise_model(model, "int8")
    merge_linears(model)
    assert not any(isinstance(module, MergedLinear) for module in model.decoder.modules())
    assert len(kinds(model)) == 22


def test_gradients_reach_what_is_trained():
    model = quantise_model(model_of(), "int4")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.projector.requires_grad_(True)
    request = {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "b"}]}
    model(model.prepare([{**request, "images": [PICTURE]}], labels=True), logits="none").loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.projector.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int2"}, "scheme 'int2' is unknown"),
        ({"group": 48}, "int4: group 48 is not supported"),
        ({"scheme": "int8", "symmetric": False}, "int8 weights are symmetric"),
        ({"head": "int4"}, "head is 'int4': use 'int8' or None"),
        ({"tower": "int4"}, "tower is 'int4'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(QuantisationError, match=message):
        Quantisation(**options)


def test_an_unknown_scheme_of_load():
    with pytest.raises(QuantisationError, match=r"quantize is 'nf4': use 'int8', 'int4', None or a Quantisation"):
        llava_fast.load("anywhere", quantize="nf4")


def test_what_is_printed():
    text = repr(quantise_model(model_of(), Quantisation("int4", symmetric=False)))
    assert "(up_proj): QuantisedLinear(64, 128, int4, group=32, zero points, bias=False)" in text
    assert f"(lm_head): QuantisedLinear(64, {tiny.VOCABULARY}, int8, bias=False)" in text


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_layers_decode_in_the_native_step(scheme, monkeypatch):
    model = quantise_model(model_of("next"), scheme)
    calls = []
    run = native.decoder_step
    monkeypatch.setattr(native, "decoder_step", lambda *a: calls.append(1) or run(*a))
    tokens = model.generate([REQUEST], max_new_tokens=6, ignore_eos=True)
    assert len(calls) == 5
    q_proj = model.decoder.layers[0].self_attn.q_proj
    q_proj.scale = q_proj.scale * 0
    q_proj.scale[:] = 1e3
    model.generate([REQUEST], max_new_tokens=3, ignore_eos=True)
    q_proj.order = torch.arange(q_proj.in_features)
    assert model.generate([REQUEST], max_new_tokens=6, ignore_eos=True) != tokens
    assert len(calls) == 7
