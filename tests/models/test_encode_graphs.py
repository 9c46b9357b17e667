"""Plans padded to buckets give the same rows; with a GPU, so do replayed graphs."""

import copy
import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from llava_fast.generation.prompt import read_prompt
from llava_fast.generation.runner import Runner
from llava_fast.inputs.plan.buckets import Bucket, bucket_of, fill
from llava_fast.models import encode_graphs
from llava_fast.models.encode_graphs import EncodeGraphs, filled_batch, graph_key
from llava_fast.ops import backend, use_backend
from llava_fast.ops.selection import policy, samples
from llava_fast.ops.selection.call_class import call_class
from tests.support import tiny
from tests.support.played import PlayedEncoding


def batches(model):
    """Batches of one and two requests, different in tiles and rows, one with text alone."""
    rng = np.random.default_rng(0)
    requests = [
        {"prompt": "<image>\nWhat?", "images": [rng.integers(0, 256, (h, w, 3), np.uint8)]}
        for h, w in ((30, 40), (20, 70), (64, 31))
    ]
    requests.append({"prompt": "No picture.", "images": []})
    return [model.prepare(requests[:1]), model.prepare(requests[1:3]), model.prepare(requests[2:], layout="padded")]


@pytest.mark.parametrize("name", ["next", "llava15"])
@torch.no_grad()
def test_fillers_change_no_row(name):
    model = tiny.pair(name).ours
    for batch in batches(model):
        bucket = bucket_of(batch.plan)
        assert bucket.tiles >= batch.plan.tiles
        assert bucket.rows >= batch.plan.rows
        for larger in (bucket, Bucket(bucket.tiles + 2, bucket.kept + 70, bucket.rows + 5)):
            filled = filled_batch(batch, larger)
            out = model.inputs_embeds(filled)
            assert out.shape[0] == larger.rows
            assert len(filled.tiles) == larger.tiles
            torch.testing.assert_close(out[: batch.plan.rows], model.inputs_embeds(batch), rtol=1e-5, atol=1e-6)
            assert not out[batch.plan.rows :].any()


def test_a_graph_serves_only_tiles_of_its_form_and_its_backend():
    batch = batches(tiny.pair("next").ours)[0]
    bucket = bucket_of(batch.plan)
    keys = {graph_key(batch, bucket), graph_key(replace(batch, tiles=batch.tiles.float()), bucket)}
    with use_backend("triton"):
        keys |= {graph_key(batch, bucket)}
    assert len(keys) == 3


def test_weights_that_were_replaced_are_seen_and_values_that_changed_are_not():
    model = copy.deepcopy(tiny.pair("next").ours)
    graphs, batch = PlayedEncoding(model), batches(model)[0]

    def check(captures):
        torch.testing.assert_close(graphs(batch), model.inputs_embeds(batch).detach(), rtol=1e-5, atol=1e-6)
        assert graphs.captures == captures

    check(1)
    for number, name in enumerate(("image_newline", "projector.layers.0.bias", "decoder.embed_tokens.weight"), 1):
        part = model.get_parameter(name)
        with torch.no_grad():
            part.add_(1)
        check(number)
        part.data = part.data.clone()
        check(number + 1)
    layer = model.vision_tower.encoder.layers[0].mlp
    layer.fc1 = nn.Linear(layer.fc1.in_features, layer.fc1.out_features)
    check(5)


def test_buckets_waste_at_most_a_fifth_of_the_tiles_and_a_third_of_the_rows():
    plan = batches(tiny.pair("next").ours)[0].plan
    from llava_fast.inputs.plan.buckets import _round_up

    for digits, most in ((2, 3 / 2), (3, 5 / 4)):
        for number in range(1, 5000):
            rounded = _round_up(number, 1, digits)
            assert number <= rounded <= most * number
            assert _round_up(rounded, 1, digits) == rounded
    assert [_round_up(number, 1, 3) for number in (1, 2, 3, 5, 7, 9, 13, 40)] == [1, 2, 3, 5, 7, 10, 14, 40]
    assert len({_round_up(number, 64) for number in range(1, 5000)}) < 20
    assert bucket_of(replace(plan, tiles=5)).tiles == 5
    with pytest.raises(ValueError, match="does not fit"):
        fill(plan, Bucket(plan.tiles - 1, 10_000, 10_000))


def test_what_has_no_filler_is_refused():
    video = tiny.pair("video").ours
    frames = np.zeros((4, 30, 40, 3), np.uint8)
    batch = video.prepare([{"prompt": "<video>\nWhat?", "video": frames}])
    with pytest.raises(ValueError, match="pooled rows"):
        fill(batch.plan, bucket_of(batch.plan))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="need a model on CUDA"):
            EncodeGraphs(video)


@pytest.mark.parametrize("name", ["next", "llava15"])
def test_the_runner_encodes_from_graphs(name):
    """From a bucket's second batch on; rows that a sequence keeps are its own."""
    model = tiny.pair(name).ours
    runner = Runner(model)
    runner.encoder = graphs = PlayedEncoding(model)
    rng = np.random.default_rng(1)
    picture = [rng.integers(0, 256, (30, 40, 3), np.uint8) for _ in range(3)]
    kept = []
    with torch.inference_mode():
        for number, image in enumerate(picture):
            parts = read_prompt(model.processor, {"prompt": "<image>\nWhat?", "images": [image]}).parts
            (found,) = runner._encoded([parts])
            kept.append(found)
            assert graphs.replays == number
        runner.encoder = None
        for image, found in zip(picture, kept, strict=True):
            parts = read_prompt(model.processor, {"prompt": "<image>\nWhat?", "images": [image]}).parts
            torch.testing.assert_close(found, runner._encoded([parts])[0], rtol=1e-5, atol=1e-6)
    assert graphs.captures == 1
    assert graphs.unfit is None


def test_what_a_graph_may_not_stand_for_runs_the_modules():
    model = copy.deepcopy(tiny.pair("next").ours)
    graphs, batch = PlayedEncoding(model), batches(model)[0]

    def check(replays):
        for _ in range(2):
            torch.testing.assert_close(graphs.encode(batch), model.inputs_embeds(batch).detach(), rtol=1e-5, atol=1e-6)
        assert graphs.replays == replays

    check(1)
    layer = model.vision_tower.encoder.layers[0]
    hook = layer.mlp.register_forward_hook(lambda module, args, out: out * 3)
    check(1)
    assert "hook" in graphs.unfit
    hook.remove()
    check(3)
    layer.mlp.fc1.weight.data = layer.mlp.fc1.weight.data * 2
    check(5)
    layer.mlp.fc1 = nn.Sequential(layer.mlp.fc1, nn.Dropout(0.0))
    check(5)
    assert "(Dropout)" in graphs.unfit
    layer.mlp.fc1 = layer.mlp.fc1[0]
    check(7)
    video = tiny.pair("video").ours
    frames = np.zeros((4, 30, 40, 3), np.uint8)
    batch = video.prepare([{"prompt": "<video>\nWhat?", "video": frames}])
    graphs = PlayedEncoding(video)
    for _ in range(2):
        assert torch.equal(graphs.encode(batch), video.inputs_embeds(batch))
    assert not graphs.captures


def test_a_bucket_that_fails_leaves_the_others_their_graphs(caplog):
    """It is not tried again until a weight moves."""
    model = copy.deepcopy(tiny.pair("next").ours)
    graphs, (small, large, _) = PlayedEncoding(model), batches(model)

    def check(batch, replays):
        torch.testing.assert_close(graphs.encode(batch), model.inputs_embeds(batch).detach(), rtol=1e-5, atol=1e-6)
        assert graphs.replays == replays

    sizes = [bucket_of(each.plan).tiles for each in (small, large)]
    assert sizes[0] != sizes[1]
    for batch in (small, large):
        check(batch, 0)
    stay = graphs.capture
    graphs.capture = lambda run: 1 / 0
    for _ in range(3):
        check(large, 0)
    graphs.capture = stay
    check(small, 1)
    check(large, 1)
    check(small, 2)
    assert graphs.unfit is None
    (why,) = graphs.failed.values()
    assert f"capturing encoding up to {sizes[1]} tiles" in why
    assert "failed: ZeroDivisionError" in why
    assert caplog.text.count("the modules of such batches run one by one") == 1
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        graphs(large)
    model.projector.layers[0].bias.data = model.projector.layers[0].bias.data.clone()
    check(large, 3)
    assert not graphs.failed


def test_a_first_batch_that_fails_runs_as_it_is(monkeypatch, caplog):
    """As one whose padding finds no memory."""
    model = tiny.pair("next").ours
    graphs, batch = PlayedEncoding(model), batches(model)[0]
    expected = model.inputs_embeds(batch).detach()
    monkeypatch.setattr(encode_graphs, "filled_batch", lambda *args: 1 / 0)
    for _ in range(3):
        assert torch.equal(graphs.encode(batch), expected)
    assert (graphs.captures, len(graphs.failed), graphs.unfit) == (0, 1, None)
    assert caplog.text.count("run one by one") == 1


def test_autocast_runs_the_modules():
    """It casts weights once for its block: a graph captured there would read freed memory."""
    model = tiny.pair("next").ours
    graphs, batch = PlayedEncoding(model), batches(model)[0]
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert torch.equal(graphs.encode(batch), model.inputs_embeds(batch))
    assert not graphs.captures
    for _ in range(2):
        graphs.encode(batch)
    assert graphs.replays == 1
    with torch.autocast("cpu", torch.bfloat16):
        graphs.encode(batch)
    assert graphs.replays == 1


class Doubled(nn.Module):
    """Wraps an embedding as PEFT does."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, ids):
        return self.base_layer(ids) * 2


def test_what_the_embedding_does_is_seen():
    model = copy.deepcopy(tiny.pair("next").ours)
    graphs, batch = PlayedEncoding(model), batches(model)[0]

    def check(replays):
        for _ in range(2):
            torch.testing.assert_close(graphs.encode(batch), model.inputs_embeds(batch).detach(), rtol=1e-5, atol=1e-6)
        assert graphs.replays == replays

    check(1)
    hook = model.decoder.embed_tokens.register_forward_hook(lambda module, args, out: out * 3)
    check(1)
    assert "hook" in graphs.unfit
    hook.remove()
    check(3)
    model.decoder.embed_tokens = Doubled(model.decoder.embed_tokens)
    check(3)
    assert "(Doubled)" in graphs.unfit
    model.decoder.embed_tokens = model.decoder.embed_tokens.base_layer
    check(5)


def test_a_buckets_first_batch_runs_every_op_as_the_graph_will(monkeypatch):
    """So that the ops are proven for the graph's calls, which have fillers and a count of rows in use."""
    classes = set()

    def run(operator, implementation, args):
        ignored = samples.IGNORED.get(operator, ())
        classes.add(call_class(operator, args, samples.ROW_ARGS.get(operator, ()), ignored))
        return implementation(*args)

    monkeypatch.setattr(policy, "run", run)
    monkeypatch.setattr(backend, "serves", lambda op, device: True)
    model = tiny.pair("next").ours
    graphs, batch = PlayedEncoding(model), batches(model)[1]
    graphs.encode(batch)
    assert not graphs.captures
    first = set(classes)
    graphs.encode(batch)
    assert graphs.replays == 1
    assert classes == first
    assert any(each.startswith("assemble_inputs") for each in first)


def test_the_graph_used_longest_ago_is_dropped(monkeypatch):
    monkeypatch.setattr(encode_graphs, "MOST_GRAPHS", 2)
    model = tiny.pair("next").ours
    graphs, several = PlayedEncoding(model), batches(model)
    for batch in (several[0], several[1], several[0], several[2]):
        graphs(batch)
    assert graphs.captures == 3
    assert graphs.graphs.keys == [graph_key(each, bucket_of(each.plan)) for each in (several[0], several[2])]
    video = weakref.ref(model_gone := copy.deepcopy(model))
    kept = PlayedEncoding(model_gone)
    del model_gone
    gc.collect()
    assert video() is None
    with pytest.raises(AssertionError, match="gone"):
        kept.model  # noqa: B018


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_a_replay_is_what_the_model_gives(name):
    """What the kernels give in a graph is what PyTorch gives without one."""
    model = copy.deepcopy(tiny.pair("next").ours).to("cuda")
    graphs = EncodeGraphs(model)

    def check(batch):
        with use_backend(name):
            found = graphs(batch)
        with torch.no_grad(), use_backend("reference"):
            torch.testing.assert_close(found, model.inputs_embeds(batch), rtol=1e-4, atol=1e-5)

    for batch in [*batches(model), *batches(model)]:
        check(batch)
    captured = len(graphs.graphs.keys)
    model.projector.layers[0].weight.data = model.projector.layers[0].weight.data * 2
    check(batch)
    assert len(graphs.graphs.keys) == captured
