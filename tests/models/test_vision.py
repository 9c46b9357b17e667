"""The tower's fused steps: the same numbers on every backend, and what is wrapped or hooked keeps its own forward."""

import copy
import dataclasses
import pickle

import pytest
import tiny
import torch
from parity import assert_close
from torch import nn

from llava_fast.models import layer_norms, merged_linear
from llava_fast.models.merged_linear import MergingModule
from llava_fast.ops import use_backend

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
        run = getattr(layer_norms, op)
        monkeypatch.setattr(layer_norms, op, lambda *a, op=op, run=run: calls.append(op) or run(*a))
    expected = tower(tiles)
    assert not calls  # the steps themselves, where nothing fuses them
    with use_backend("triton"):
        torch.testing.assert_close(tower(tiles), expected, rtol=1e-4, atol=1e-5)
    assert calls.count("double_layer_norm") == doubles and calls.count("layer_norm") == alone
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
    assert seen[:2] == ["before", "query"] and "norm" in seen and len(seen) == 4
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


class Pair(MergingModule):
    """Two Linears of one input."""

    def __init__(self, bias=True):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4, bias), nn.Linear(6, 3, bias)
        self.requires_grad_(False)

    def forward(self, x):
        with use_backend("triton"):
            return torch.cat(self.run_linears(x, self.a, self.b), dim=-1)

    def check(self):
        x = torch.randn(2, 5, 6, dtype=self.a.weight.dtype)
        torch.testing.assert_close(self(x), torch.cat([self.a(x), self.b(x)], dim=-1))
        return merged_linear._joined.get(self)


@pytest.mark.parametrize("bias", [True, False])
def test_frozen_linears_are_joined_once(bias):
    pair = Pair(bias)
    kept = pair.check()
    assert kept is not None and pair.check() is kept
    copied, restored = copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))
    assert set(pair.state_dict()) == {n for n, _ in pair.named_parameters()}
    assert merged_linear._joined.get(copied) is None and merged_linear._joined.get(restored) is None
    assert copied.check() and restored.check() and pair.check() is kept


def test_changed_weights_are_joined_anew():
    pair, zeros = Pair(), torch.zeros(4, 6)

    def in_place():
        pair.b.bias.add_(1)

    def loaded():
        pair.load_state_dict({name: torch.randn_like(value) for name, value in pair.state_dict().items()})

    def assigned():
        pair.load_state_dict({name: torch.randn_like(value) for name, value in pair.state_dict().items()}, assign=True)
        pair.requires_grad_(False)

    def another_memory():
        pair.a.weight.data = zeros

    def rounded():
        pair.half().float()

    def merged_adapter():  # as PEFT does: the Linear is wrapped, changed through .data and put back
        linear, pair.a = pair.a, nn.Sequential(pair.a)
        linear.weight.data += 1
        pair.a = linear

    kept = pair.check()
    for change in (in_place, loaded, assigned, another_memory, rounded, merged_adapter):
        change()
        again = pair.check()
        assert again is not None and again is not kept, change.__name__
        kept = again


def test_what_trains_is_not_kept():
    pair = Pair()
    assert pair.check()
    pair.a.requires_grad_(True)
    assert pair.check() is None
    x = torch.randn(3, 6, requires_grad=True)
    found = torch.autograd.grad(pair(x).square().sum(), [x, pair.a.weight, pair.a.bias])
    plain = torch.cat([pair.a(x), pair.b(x)], dim=-1)
    expected = torch.autograd.grad(plain.square().sum(), [x, pair.a.weight, pair.a.bias])
    torch.testing.assert_close(found, expected)


def test_what_inference_keeps_serves_training():
    pair = Pair()
    with torch.inference_mode():
        kept = pair.check()
    x = torch.randn(3, 6, requires_grad=True)
    pair(x).sum().backward()
    assert merged_linear._joined.get(pair) is kept and x.grad is not None


def test_only_plain_linears_of_one_kind_are_joined():
    pair = Pair()
    pair.a.bias = None
    assert pair.check() is None
    pair = Pair()
    calls = []
    pair.b.register_forward_hook(lambda module, args, out: calls.append(1))
    assert pair.check() is None and len(calls) == 2
    pair = Pair()
    compiled = torch.compile(lambda x: pair.run_linears(x, pair.a, pair.b), backend="aot_eager")
    x = torch.randn(2, 6)
    with use_backend("triton"):
        found = compiled(x)
    torch.testing.assert_close(found, (pair.a(x), pair.b(x)))
