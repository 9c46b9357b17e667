"""The tower's fused steps: the same numbers on every backend, and what is wrapped or hooked keeps its own forward."""

import contextlib
import copy
import dataclasses

import pytest
import safetensors.torch
import tiny
import torch
from parity import assert_close
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import llava_fast
from llava_fast.models import layer_norms, merged_linear
from llava_fast.models.merged_linear import run_linears
from llava_fast.ops import use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PREFIX = "vision_tower.encoder.layers.0.self_attn"
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


@pytest.mark.parametrize("bias", [True, False])
def test_linears_of_one_input_run_as_one_product(bias):
    linears = [nn.Linear(6, 4, bias), nn.Linear(6, 3, bias)]
    parameters = [parameter for linear in linears for parameter in linear.parameters()]
    x = torch.randn(2, 5, 6, requires_grad=True)
    plain = [linear(x) for linear in linears]
    with use_backend("triton"), count_products() as products:
        joined = run_linears(x, *linears)
    assert products == [7]
    torch.testing.assert_close(list(joined), plain)
    grads = [torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *parameters]) for ys in (joined, plain)]
    torch.testing.assert_close(*grads)
    with use_backend("triton"):
        with torch.no_grad():
            linears[0].weight.data += 1  # nothing stale is kept
        torch.testing.assert_close(list(run_linears(x, *linears)), [linear(x) for linear in linears])


def joins(monkeypatch):
    """A list that grows by one whenever weights are copied to be joined."""
    copies, cat = [], torch.cat
    monkeypatch.setattr(merged_linear.torch, "cat", lambda *args: copies.append(1) or cat(*args))
    return copies


@pytest.mark.parametrize("bias", [True, False])
def test_frozen_weights_laid_end_to_end_are_joined_without_a_copy(bias, monkeypatch):
    linears = [nn.Linear(6, 4, bias), nn.Linear(6, 3, bias), nn.Linear(6, 5, bias)]
    parameters = [parameter for linear in linears for parameter in linear.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    x = torch.randn(2, 6)
    plain = [linear(x) for linear in linears]
    merged_linear.lay_end_to_end(*linears)
    assert all(now is p for now, p in zip([p for each in linears for p in each.parameters()], parameters, strict=True))
    torch.testing.assert_close(parameters, before, rtol=0, atol=0)
    copies = joins(monkeypatch)
    merged_linear.lay_end_to_end(*linears)  # they lie so already
    with use_backend("triton"), torch.no_grad():
        torch.testing.assert_close(list(run_linears(x, *linears)), plain)
        assert not copies
        linears[1].weight += 1  # nothing stale is kept
        torch.testing.assert_close(list(run_linears(x, *linears)), [linear(x) for linear in linears])
        assert not copies
        linears[1].weight.data = linears[1].weight.data.clone()  # it lies elsewhere
        torch.testing.assert_close(list(run_linears(x, *linears)), [linear(x) for linear in linears])
        assert copies


def test_a_tower_that_moves_is_laid_end_to_end_again(monkeypatch):
    tower, copies = copy.deepcopy(tiny.pair("next").ours.vision_tower), joins(monkeypatch)
    names = {name: parameter.shape for name, parameter in tower.named_parameters()}
    tower.double()
    assert not copies  # on a CPU nothing is gained by it
    tower.to("meta")
    assert len(copies) == 2 * len(tower.encoder.layers)
    assert {name: parameter.shape for name, parameter in tower.named_parameters()} == names
    attention = tower.encoder.layers[0].self_attn
    with use_backend("triton"), torch.no_grad():
        run_linears(torch.ones(2, 32, device="meta", dtype=torch.float64), attention.q_proj, attention.k_proj)
    assert len(copies) == 2 * len(tower.encoder.layers)


def test_trained_weights_laid_end_to_end_get_their_gradients():
    linears = [nn.Linear(6, 4), nn.Linear(6, 3)]
    merged_linear.lay_end_to_end(*linears)
    parameters, x = [p for linear in linears for p in linear.parameters()], torch.randn(2, 6)
    with use_backend("triton"):
        joined = torch.autograd.grad(sum(y.square().sum() for y in run_linears(x, *linears)), parameters)
    plain = torch.autograd.grad(sum(linear(x).square().sum() for linear in linears), parameters)
    torch.testing.assert_close(joined, plain)


def test_a_tower_laid_end_to_end_is_saved_copied_and_trained_as_any(tmp_path):
    model = copy.deepcopy(tiny.pair("next").ours)
    expected = {name: p.detach().clone() for name, p in model.state_dict().items()}
    for layer in model.vision_tower.encoder.layers:
        merged_linear.lay_end_to_end(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    twin = copy.deepcopy(model)
    llava_fast.save(model, tmp_path / "saved")
    for again in (twin, llava_fast.load(tmp_path / "saved")):
        torch.testing.assert_close(dict(again.state_dict()), expected, rtol=0, atol=0)
    query, key = (getattr(model.vision_tower.encoder.layers[0].self_attn, name).weight for name in ("q_proj", "k_proj"))
    query.grad = torch.ones_like(query)
    torch.optim.SGD([query], lr=1.0).step()
    torch.testing.assert_close(query.detach(), expected[f"{PREFIX}.q_proj.weight"] - 1)
    torch.testing.assert_close(key.detach(), expected[f"{PREFIX}.k_proj.weight"], rtol=0, atol=0)


def own_storage(tensor):
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_state_dict_gives_weights_laid_end_to_end_storages_of_their_own(tmp_path):
    """safetensors refuses a part of a storage, and accelerate would write only one of the tensors that share one."""
    tower = copy.deepcopy(tiny.pair("next").ours.vision_tower)
    attention = tower.encoder.layers[0].self_attn
    merged_linear.lay_end_to_end(attention.q_proj, attention.k_proj, attention.v_proj)
    assert not own_storage(attention.k_proj.weight)
    state = tower.state_dict()
    assert all(map(own_storage, state.values()))
    safetensors.torch.save_model(tower, str(tmp_path / "tower.safetensors"))
    stored = safetensors.torch.load_file(tmp_path / "tower.safetensors")
    torch.testing.assert_close(stored, dict(tower.named_parameters()), rtol=0, atol=0)
    for name, parameter in tower.named_parameters():  # the memory is the parameters'
        state[name].fill_(2)
        assert (parameter == 2).all()
    kept = tower.state_dict(keep_vars=True)
    assert all(kept[name] is parameter for name, parameter in tower.named_parameters())


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("wrapped", ["wrapper", "spectral_norm"])
def test_a_tower_with_a_wrapped_linear_runs_and_moves(wrapped):
    """It may have no weight of its own, or one that is made, by a step of its own, each time it is asked for."""
    tower = copy.deepcopy(tiny.pair("next").ours.vision_tower)
    attention = tower.encoder.layers[0].self_attn
    if wrapped == "wrapper":
        attention.q_proj = Wrapper(attention.q_proj)
    else:
        parametrizations.spectral_norm(attention.q_proj)
    x = torch.randn(1, 3, 32)
    with torch.no_grad(), use_backend("triton"):
        assert attention(x).shape == x.shape
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    tower.to("cpu")
    torch.testing.assert_close(dict(tower.named_buffers()), before, rtol=0, atol=0)
    tower.to("meta")
    assert attention.k_proj.weight.is_meta


def test_a_tower_moves_in_inference_mode():
    tower = copy.deepcopy(tiny.pair("next").ours.vision_tower)
    with torch.inference_mode():
        tower.to("meta")
    attention = tower.encoder.layers[0].self_attn
    assert not own_storage(attention.q_proj.weight)


def test_only_plain_linears_of_one_kind_are_joined():
    hooked, calls = nn.Linear(6, 4), []
    hooked.register_forward_hook(lambda module, args, out: calls.append(1))
    x = torch.randn(2, 6)
    for others in ((nn.Linear(6, 4, bias=False), nn.Linear(6, 3)), (hooked, nn.Linear(6, 3))):
        with use_backend("triton"), count_products() as products:
            run_linears(x, *others)
        assert products == [4, 3]
    assert calls == [1]
    with count_products() as products:
        run_linears(x, nn.Linear(6, 4), nn.Linear(6, 3))  # on "auto": no GPU has shown it to pay
    assert products == [4, 3]


@contextlib.contextmanager
def count_products():
    """The output widths of the calls of F.linear inside the block."""
    widths, linear = [], F.linear

    def counted(x, weight, bias=None):
        widths.append(len(weight))
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", counted)
        yield widths
