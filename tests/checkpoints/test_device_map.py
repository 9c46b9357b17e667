"""Models laid out over several devices: the plan by bytes, and the same answers and gradients. A second device is one
by name alone here; tests/fake_gpu checks that no operation mixes two."""

import copy

import pytest
import torch

import llava_fast
from llava_fast.checkpoints.device_map import DeviceMap, plan_devices
from llava_fast.checkpoints.load import load_checkpoint, loaded_sizes
from llava_fast.errors import CheckpointError, RecipeError
from llava_fast.generation import llava
from llava_fast.models.quantised import Quantisation, quantise_model
from llava_fast.models.vlm import LlavaModel
from llava_fast.train.parallel import _check_one_device
from tests.support import tiny

A, B, C = (torch.device("cuda", number) for number in range(3))
CPU = torch.device("cpu")
REQUESTS = [
    {"prompt": "<image>hello there", "images": [tiny.picture(60, 90)]},
    {"prompt": "a text that is longer than one block of rows, which has sixteen"},
    {"prompt": "x"},
]


def sizes(module) -> dict[str, int]:
    return {name: each.numel() * 4 for name, each in module.named_parameters()}


def size(module) -> int:
    return sum(sizes(module).values())


def test_layers_spread_by_free_memory():
    model = tiny.pair("next").ours
    layer, total = size(model.decoder.layers[0]), size(model)
    layers, others = len(model.decoder.layers), total - layer * len(model.decoder.layers)

    def planned(*rooms):
        free = dict(zip((A, B, C), (int(room / 0.8) + 2 for room in rooms), strict=False))
        return plan_devices(model, list(free), sizes(model), free.__getitem__)

    assert layers == 3
    assert planned(total, total) == DeviceMap(A, ((A, 0),))  # the fewest
    assert planned(others + layer, 2 * layer) == DeviceMap(A, ((A, 0), (B, 1)))
    assert planned(others + layer, layer, layer) == DeviceMap(A, ((A, 0), (B, 1), (C, 2)))
    assert planned(others, 3 * layer) == DeviceMap(A, ((B, 0),))
    assert planned(others + layer, 9 * (others + layer)) == DeviceMap(A, ((A, 0), (B, 1)))  # by proportion: none on A
    found = planned(others + layer, 2 * layer)
    assert [found.device_of(f"decoder.layers.{number}.mlp.up_proj.weight") for number in range(3)] == [A, B, B]
    assert found.device_of("decoder.lm_head.weight") == found.device_of("vision_tower.x") == A
    with pytest.raises(CheckpointError, match=r"2 devices have .* for them"):
        planned(others + layer, layer)
    with pytest.raises(CheckpointError, match="the first must hold"):
        planned(others - 8, 9 * layer)


@pytest.mark.parametrize("rounded", ["while loading", "in the files"])
def test_rounded_weights_need_fewer_devices(rounded, tmp_path):
    """As many bytes as the model has once it is loaded, and a fifth."""
    rounding = Quantisation("int8", embeddings="int8")
    model = tiny.pair("next").ours
    small = quantise_model(copy.deepcopy(model), rounding)
    llava_fast.save(model if rounded == "while loading" else small, tmp_path)
    with torch.device("meta"):
        empty = LlavaModel(model.config)
    checkpoint = load_checkpoint(tmp_path, torch.float32)
    found = loaded_sizes(empty, checkpoint, rounding if rounded == "while loading" else None)
    kept = size(small) + sum(each.nbytes for each in small.buffers())
    assert sum(found.values()) == kept < 0.5 * size(model)
    room = {each: int(0.5 * size(model) / 0.8) for each in (A, B, C)}
    assert plan_devices(empty, list(room), found, room.__getitem__) == DeviceMap(A, ((A, 0),))
    assert len(plan_devices(empty, list(room), sizes(model), room.__getitem__).groups) > 1


def test_a_hosted_decoder_stays_together():
    model = tiny.pair("next_stablelm").ours
    half = int(size(model) * 0.9)
    with pytest.raises(CheckpointError, match="is not spread over devices"):
        plan_devices(model, [A, B], sizes(model), lambda device: half)


@pytest.mark.parametrize("name", ["next", "next_mistral_window", "next_qwen3"])
def test_the_same_answers_and_gradients(name):
    model = tiny.pair(name).ours
    spread = copy.deepcopy(model)
    spread.decoder.layer_groups = ((CPU, 0), (CPU, 1))
    options = {"max_new_tokens": 9, "ignore_eos": True}
    expected = model.generate(REQUESTS, **options)
    for _ in range(2):
        assert spread.generate(REQUESTS, **options) == expected
    cache = llava._idle[spread].cache
    assert [part.first_layer for part in cache.parts] == [0, 1]
    assert [part.shape[0] for part in cache.parts] == [1, model.config.decoder.num_layers - 1]
    assert all(len(part.segments) == len(cache.segments) > 0 for part in cache.parts)
    assert cache.bytes_of_all == model.decoder.new_cache().block_bytes
    chats = [each.chat() for each in (model, spread)]  # prefixes: blocks are copied
    for text in ("hello", "and then", "?"):
        first, second = [chat.send(text, max_new_tokens=5, ignore_eos=True) for chat in chats]
        assert first == second
    model.decoder.cache_codes = spread.decoder.cache_codes = "int8"
    try:
        assert spread.generate(REQUESTS, **options) == model.generate(REQUESTS, **options)
        assert [part.codes for part in llava._idle[spread].cache.parts] == ["int8", "int8"]
    finally:
        model.decoder.cache_codes = spread.decoder.cache_codes = None
    losses = []
    for each in (model, spread):
        each.zero_grad()
        out = each(each.prepare([{"prompt": "a b"}, {"prompt": "c"}]), logits="all")
        out.logits.square().mean().backward()
        losses.append([parameter.grad.clone() for parameter in each.decoder.parameters()])
    for mine, theirs in zip(*losses, strict=True):
        assert torch.equal(mine, theirs)
    model.zero_grad()
    with pytest.raises(RecipeError, match="device_map"):
        _check_one_device(spread)
    spread.to("cpu")
    assert spread.decoder.layer_groups == ()
    assert spread.generate(REQUESTS, **options) == expected


def test_load(tmp_path, monkeypatch):
    llava_fast.save(tiny.pair("next").ours, tmp_path)
    one = llava_fast.load(tmp_path, device_map=["cpu", "cpu"])
    assert one.decoder.layer_groups == ()  # one is enough
    total = size(one)
    monkeypatch.setattr("llava_fast.api.plan_devices", lambda *given: plan_devices(*given, lambda device: int(total)))
    two = llava_fast.load(tmp_path, device_map=["cpu", "cpu"])
    assert len(two.decoder.layer_groups) == 2
    options = {"max_new_tokens": 5, "ignore_eos": True}
    assert two.generate(REQUESTS, **options) == one.generate(REQUESTS, **options)
    with pytest.raises(CheckpointError, match="not both"):
        llava_fast.load(tmp_path, device="cpu", device_map="auto")
    with pytest.raises(CheckpointError, match="'auto' or a list"):
        llava_fast.load(tmp_path, device_map="balanced")
    with pytest.raises(CheckpointError, match="'auto' or a list"):
        llava_fast.load(tmp_path, device_map={"": "cpu"})
