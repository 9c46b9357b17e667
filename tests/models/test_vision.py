"""The tower's fused steps: the same numbers on every backend, and what is wrapped or hooked keeps its own forward."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from llava_fast.models.fused import norms
from llava_fast.ops import use_backend
from tests.support import tiny
from tests.support.parity import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["llava15", "llava15_layers", "next_first_layer", "onevision"]


def tower_and_tiles(name: str):
    model = tiny.pair(name).ours
    tiles = torch.from_numpy(model.processor.tiles(tiny.picture(60, 90)))[:2]
    return copy.deepcopy(model.vision_tower).to(DEVICE), tiles.to(DEVICE)


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_tower_gives_the_same_features_and_gradients(name):
    tower, tiles = tower_and_tiles(name)
    trained = [p for n, p in tower.named_parameters() if "layers.2" not in n and "post_" not in n]
    found = {}
    for backend in ("reference", "triton"):
        with use_backend(backend):
            features = tower(tiles)
            gradients = torch.autograd.grad(features.square().sum(), trained, allow_unused=True)
        found[backend] = features, gradients
    assert_close("fused tower", found["triton"][0], found["reference"][0])
    largest = max(g.abs().max() for g in found["reference"][1] if g is not None)
    for mine, theirs in zip(found["triton"][1], found["reference"][1], strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine - theirs).abs().max() <= 1e-4 * max(theirs.abs().max(), 1e-3 * largest)


@pytest.mark.parametrize(
    ("name", "feature_layers", "doubles", "alone"),
    [("llava15", (-2,), 1, 0), ("llava15", (0, 2), 0, 1), ("llava15", (0,), 0, 0), ("onevision", (-1,), 0, 1)],
)
def test_each_norm_is_one_op_with_the_step_before_it(name, feature_layers, doubles, alone, monkeypatch):
    tower, tiles = tower_and_tiles(name)
    tower.config = dataclasses.replace(tower.config, feature_layers=feature_layers)
    calls = []
    for op in ("layer_norm", "add_layer_norm", "double_layer_norm"):
        run = getattr(norms, op)
        monkeypatch.setattr(norms, op, lambda *a, op=op, run=run: calls.append(op) or run(*a))
    expected = tower(tiles)
    assert not calls  # the steps themselves, where nothing fuses them
    with use_backend("triton"):
        torch.testing.assert_close(tower(tiles), expected, rtol=1e-4, atol=1e-5)
    assert calls.count("double_layer_norm") == doubles
    assert calls.count("layer_norm") == alone
    assert len(calls) == 2 * tower.config.layers_needed


@pytest.mark.parametrize("backend", ["auto", "triton"])
@torch.no_grad()
def test_what_is_hooked_or_replaced_runs_its_own_forward(backend):
    tower, tiles = tower_and_tiles("llava15_layers")
    with use_backend(backend):
        check_own_forwards(tower, tiles)


def check_own_forwards(tower, tiles):
    expected, layers, seen = tower(tiles), tower.encoder.layers, []

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            seen.append("wrapped")
            return self.inner(x)

    hooks = [
        layers[0].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape))),
        layers[1].layer_norm2.register_forward_hook(lambda module, args, out: seen.append("norm")),
        tower.pre_layrnorm.register_forward_hook(lambda module, args, out: seen.append("before")),
        layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: seen.append("query")),
    ]
    torch.testing.assert_close(tower(tiles), expected, rtol=1e-4, atol=1e-5)
    assert seen[:2] == ["before", "query"]
    assert "norm" in seen
    assert len(seen) == 4
    assert (len(tiles), tower.embeddings.position_embedding.num_embeddings, tower.config.hidden_size) in seen
    for hook in hooks:
        hook.remove()
    layers[1] = Wrapped(layers[1])
    layers[0].layer_norm1 = Wrapped(layers[0].layer_norm1)
    seen.clear()
    torch.testing.assert_close(tower(tiles), expected, rtol=1e-4, atol=1e-5)
    assert seen == ["wrapped", "wrapped"]
    layers[0].layer_norm2.bias = None
    assert torch.isfinite(tower(tiles)).all()


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_the_tower_compiles_as_one_graph(backend):
    tower, tiles = tower_and_tiles("llava15")
    weight = tower.encoder.layers[0].layer_norm1.weight
    with use_backend(backend):
        found, expected = torch.compile(tower, fullgraph=True, backend="aot_eager")(tiles), tower(tiles)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(features.square().sum(), weight)[0] for features in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("wrapped", ["wrapper", "spectral_norm"])
def test_a_wrapped_linear_runs_itself(wrapped):
    """It may have no weight of its own, or one that is made, by a step of its own, each time it is asked for."""
    attention = copy.deepcopy(tiny.pair("next").ours.vision_tower.encoder.layers[0].self_attn)
    if wrapped == "wrapper":
        attention.q_proj = Wrapper(attention.q_proj)
    else:
        parametrizations.spectral_norm(attention.q_proj)
    other, x = copy.deepcopy(attention), torch.randn(1, 3, 32)
    with torch.no_grad():
        expected = attention(x)
        with use_backend("triton"):
            torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(dict(other.named_buffers()), dict(attention.named_buffers()))
