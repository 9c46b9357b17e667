"""The decoder's RMSNorm, SwiGLU and RoPE inside an accelerated transformers model, against the same model as it was."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import llava_fast
from llava_fast.accelerated import decoder, patch, self_check
from llava_fast.models.fused import gate
from llava_fast.ops import rms_norm, use_backend
from llava_fast.ops.backend import BackendError
from tests.support import tiny
from tests.support.against_stock import assert_same_gradients, assert_same_outputs, batch, gradients
from tests.support.parity import assert_close

NAMES = [
    "llava15",
    "next_mistral_window",
    "next_qwen",
    "next_biases",
    "next_llama3",
]  # each family, GQA, biases, a window
OPS = ("rms_norm", "rope", "swiglu")


def fresh(name: str):
    return tiny.hf_model(tiny.CASES[name])


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often each op was called by the decoder, but for trials of it."""
    counts = dict.fromkeys(OPS, 0)

    def counted(name, op, *args):
        counts[name] += not self_check.in_trial()
        return op(*args)

    for name in OPS:
        monkeypatch.setattr(decoder, name, functools.partial(counted, name, getattr(decoder, name)))
    return counts


def few_rows(name: str, labels: bool = False) -> dict:
    """Text alone: what the interpreter runs in a second."""
    inputs = batch(name, "none", labels=labels)
    return {key: value[:, :9] if value.dim() == 2 else value for key, value in inputs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_kernels_give_what_stock_gives(name, calls):
    stock, model = fresh(name), llava_fast.accelerate(fresh(name))
    inputs = few_rows(name)
    with use_backend("triton"):
        assert_same_outputs(model, stock, inputs)
    assert calls == {"rms_norm": 7, "rope": 3, "swiglu": 3}


@pytest.mark.parametrize("name", ["llava15", "next_mistral_window", "next_qwen"])
def test_kernels_give_stocks_gradients(name, calls):
    stock, model = fresh(name), llava_fast.accelerate(fresh(name))
    inputs = few_rows(name, labels=True)
    expected = gradients(stock, inputs)[1]
    with use_backend("triton"):
        # whole_forward's loss has no kernel
        model.forward = stock.__class__.forward.__get__(model)
        found = gradients(model, inputs)[1]
    assert_same_gradients("gradients through decoder kernels", found, expected)
    assert all(calls.values())


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}])
def test_kernels_generate_the_same_tokens(how):
    stock, model = fresh("next_qwen"), llava_fast.accelerate(fresh("next_qwen"))
    inputs = few_rows("next_qwen")
    kwargs = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | how
    with use_backend("triton"):
        found = model.generate(**inputs, **kwargs)
    assert torch.equal(found, stock.generate(**inputs, **kwargs))


def test_attention_weights_are_given_where_they_are_asked_for(calls):
    stock, model = fresh("next_mistral_window"), llava_fast.accelerate(fresh("next_mistral_window"))
    inputs = few_rows("next_mistral_window")
    for each in (stock, model):
        each.set_attn_implementation("eager")
    with use_backend("triton"), torch.no_grad():
        found, expected = (each(**inputs, output_attentions=True).attentions for each in (model, stock))
    assert len(found) == len(expected) == calls["rope"] == 3
    for mine, theirs in zip(found, expected, strict=True):
        assert_close("attention weights", mine, theirs, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_many_rows_on_a_cpu(name, calls, monkeypatch):
    """The references, taken from so many values on; here from one."""
    monkeypatch.setattr(gate, "LEAST", 1)
    stock, model = fresh(name), llava_fast.accelerate(fresh(name))
    for side in ("left", "right"):
        inputs = batch(name, side=side, labels=True)
        assert_same_outputs(model, stock, inputs)
    assert_same_gradients("gradients through the references", gradients(model, inputs)[1], gradients(stock, inputs)[1])
    assert calls["rms_norm"]
    assert calls["rope"]
    assert not calls["swiglu"]


def test_few_rows_on_a_cpu_are_stock(calls):
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    with torch.no_grad():
        inputs = few_rows("next")
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
        x = torch.randn(1, gate.LEAST // 64, 64)
        assert_close("a norm", model.model.language_model.norm(x), stock.model.language_model.norm(x), 1e-6)
    assert calls == {"rms_norm": 1, "rope": 0, "swiglu": 0}


def test_half_precision_and_autocast(calls):
    """float16 alone: the interpreter's bfloat16 casts truncate."""
    dtype = torch.float16
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    exact = copy.deepcopy(stock).double()
    inputs = few_rows("next")
    with torch.no_grad():
        truth = exact(**inputs).logits
        for cast in (True, False):
            if not cast:
                stock, model = stock.to(dtype), model.to(dtype)
            with torch.autocast("cpu", dtype, enabled=cast), use_backend("triton"):
                found, expected = model(**inputs).logits, stock(**inputs).logits
            assert found.dtype == expected.dtype
            errors = [(out.double() - truth).abs().max() for out in (found, expected)]
            assert errors[0] <= 2 * errors[1]
    assert calls == {"rms_norm": 14, "rope": 6, "swiglu": 6}


def test_a_float64_model_is_stock(monkeypatch):
    """Its RMSNorm is float32 inside, which the op's would not be."""
    monkeypatch.setattr(gate, "LEAST", 1)
    stock, model = fresh("next").double(), llava_fast.accelerate(fresh("next").double())
    with torch.no_grad():
        assert torch.equal(model(**few_rows("next")).logits, stock(**few_rows("next")).logits)


def test_less_is_kept_for_the_backward_pass():
    """Bytes that autograd keeps of a layer's norm and MLP, counted once each."""
    stock, model = (fresh("next").bfloat16() for _ in "ab")
    llava_fast.accelerate(model)

    def kept(run):
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            run(torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True))
        return sum(found.values())

    norm, mlp = (
        [each.model.language_model.layers[0].get_submodule(part) for each in (model, stock)]
        for part in ("input_layernorm", "mlp")
    )
    with use_backend("triton"):
        assert kept(norm[0]) < 0.4 * kept(norm[1])  # 2 bytes a value beside 2 + 4
        assert kept(mlp[0]) <= kept(mlp[1]) - 100 * 128 * 2  # without silu(gate)


def test_hooks_and_lora_and_a_parametrised_weight(calls, monkeypatch):
    monkeypatch.setattr(gate, "LEAST", 1)

    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    for each in (stock, model):
        layers = each.model.language_model.layers
        for part in ("input_layernorm", "mlp", "mlp.act_fn", "mlp.up_proj", "self_attn.k_proj"):
            layers[0].get_submodule(part).register_forward_hook(lambda module, args, output: output * 1.5)
        layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"hidden_states": kwargs["hidden_states"] * 0.5}),
            with_kwargs=True,
        )
        parametrize.register_parametrization(layers[1].input_layernorm, "weight", Doubled())
        layers[2].mlp.act_fn = nn.GELU()
    inputs = few_rows("next", labels=True)
    assert_same_outputs(model, stock, inputs)
    assert_same_gradients("gradients beside hooks", gradients(model, inputs)[1], gradients(stock, inputs)[1])
    assert calls["rms_norm"] == 12
    assert calls["rope"] == 6
    llava_fast.restore(model)
    for module in model.model.language_model.modules():
        assert "forward" not in vars(module)


def test_a_compiled_graph_is_the_stock_one(calls, monkeypatch):
    monkeypatch.setattr(gate, "LEAST", 1)
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    for part in ("input_layernorm", "mlp"):
        x = torch.randn(2, 9, 64)
        mine, theirs = (each.model.language_model.layers[0].get_submodule(part) for each in (model, stock))
        found = torch.compile(mine, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, theirs(x), rtol=1e-6, atol=1e-6)
    assert not any(calls.values())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_use_their_own_weights(copier, monkeypatch):
    monkeypatch.setattr(gate, "LEAST", 1)
    model, stock = llava_fast.accelerate(fresh("next")), fresh("next")
    twin = copier(model)
    inputs = few_rows("next")
    with torch.no_grad():
        before = model(**inputs).logits
        for each in (twin, stock):
            for parameter in each.model.language_model.parameters():
                parameter.mul_(0.9)
        assert torch.equal(model(**inputs).logits, before)
        assert_close("a copy", twin(**inputs).logits, stock(**inputs).logits, 1e-5)


def test_what_is_replaced_and_restored():
    model = llava_fast.accelerate(fresh("next"))
    words = patch.replaced(model)
    assert len(words) == len(set(words))
    assert sum(word.startswith("the decoder's") for word in words) == 3
    decoder = model.model.language_model
    assert sum("forward" in vars(module) for module in decoder.modules()) == 3 * 4 + 1
    assert "forward" not in vars(decoder)
    assert "forward" not in vars(decoder.layers[0])
    llava_fast.restore(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_class_that_someone_else_has_changed_is_left(monkeypatch):
    model = fresh("next")
    norm, attention = type(model.model.language_model.norm), type(model.model.language_model.layers[0].self_attn)
    monkeypatch.setattr(norm, "forward", lambda self, hidden_states: hidden_states)  # of this module, not of theirs

    def other(self, hidden_states, position_embeddings, one_more=None):
        return hidden_states, None

    other.__module__ = attention.__module__
    monkeypatch.setattr(attention, "forward", other)
    llava_fast.accelerate(model)
    layer = model.model.language_model.layers[0]
    assert "forward" not in vars(layer.input_layernorm)
    assert "forward" not in vars(layer.self_attn)
    assert "forward" in vars(layer.mlp)


def test_a_subclass_is_left():
    model = fresh("next")
    layer = model.model.language_model.layers[0]
    layer.mlp.__class__ = type("Mine", (type(layer.mlp),), {})
    llava_fast.accelerate(model)
    assert "forward" not in vars(layer.mlp)


def test_a_backend_without_these_ops_takes_the_stock_steps():
    """The gate's one rule, in the engine as here; an op that is called says that the backend cannot serve it."""
    stock, model = fresh("next"), llava_fast.accelerate(fresh("next"))
    with use_backend("native"):
        assert torch.equal(model(**few_rows("next")).logits, stock(**few_rows("next")).logits)
        with pytest.raises(BackendError, match="'native' does not serve the op 'rms_norm'"):
            rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)
