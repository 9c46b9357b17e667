"""The decoder with its kernels (rms_norm, rope, swiglu) against itself with PyTorch's steps."""

import copy

import pytest
import torch

from llava_fast.models.blocks.attention import Spans
from llava_fast.models.fused import linears, norms, rotary
from llava_fast.ops import use_backend
from tests.support import tiny
from tests.support.parity import assert_close

OPS = {"rms_norm": norms, "add_rms_norm": norms, "rope": rotary, "swiglu": linears}
SPANS = Spans((0, 5), (5, 3))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The ops that the decoder called."""
    taken: list[str] = []
    for name, module in OPS.items():
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, op=op, **k: taken.append(name) or op(*a, **k))
    return taken


def decoder_and_rows(name: str):
    decoder = copy.deepcopy(tiny.pair(name).ours.decoder)
    x = torch.randn(8, decoder.config.hidden_size, requires_grad=True)
    return decoder, x, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


@pytest.mark.parametrize("name", ["next", "next_mistral_window", "next_qwen", "next_biases", "next_dynamic_rope"])
def test_kernels_give_what_steps_give(name, calls):
    decoder, x, position = decoder_and_rows(name)
    wanted = [x, *decoder.layers.parameters(), *decoder.norm.parameters()]
    results = []
    for backend in ("auto", "triton"):
        with use_backend(backend):
            out = decoder(x, position, SPANS)
            results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
        assert bool(calls) == (backend == "triton")
    assert calls == ["rms_norm", "rope", "add_rms_norm", "swiglu"] * 3 + ["rms_norm"]
    for expected, found in zip(*results, strict=True):
        assert_close("decoder kernels", found, expected)


def test_a_hooked_norm_runs_its_own_forward(calls):
    decoder, x, position = decoder_and_rows("next")
    seen = []
    decoder.layers[1].post_attention_layernorm.register_forward_hook(
        lambda norm, args, out: seen.append(args[0].shape) or out * 2
    )
    found = []
    for backend in ("auto", "triton"):
        with use_backend(backend), torch.no_grad():
            found.append(decoder(x, position, SPANS))
    assert len(seen) == 2
    # without gradients each layer's last add belongs to the next norm
    assert calls.count("add_rms_norm") == 2 + 3
    assert_close("a hooked norm", *found)


def test_without_gradients_every_add_is_fused(calls):
    decoder, x, position = decoder_and_rows("next")
    with use_backend("triton"), torch.no_grad():
        decoder(x, position, SPANS)
    first, *rest = calls
    assert first == "rms_norm"
    assert rest == ["rope", "add_rms_norm", "swiglu", "add_rms_norm"] * 3


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_other_backends_take_the_steps(backend, calls):
    decoder, x, position = decoder_and_rows("next")
    with use_backend(backend), torch.no_grad():
        found = decoder(x, position, SPANS)
    assert not calls
    assert torch.equal(found, decoder(x, position, SPANS))


def test_a_traced_graph_takes_the_steps(calls):
    decoder, x, _position = decoder_and_rows("next")
    compiled = torch.compile(decoder.layers[0].mlp, fullgraph=True, backend="aot_eager")
    with use_backend("triton"), torch.no_grad():
        found = compiled(x)
    assert not calls
    torch.testing.assert_close(found, decoder.layers[0].mlp(x))
