"""Plans padded to buckets give the same rows; with a GPU, so do replayed graphs."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from llava_fast.inputs.plan.buckets import Bucket, bucket_of, fill
from llava_fast.models.encode_graphs import EncodeGraphs, filled_batch, graph_key, weight_addresses
from llava_fast.ops import use_backend
from tests.support import tiny


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
    before = weight_addresses(model)
    with torch.no_grad():
        for part in (model.image_newline, model.projector.layers[0].bias, model.decoder.embed_tokens.weight):
            part.add_(1)
            assert weight_addresses(model) == before
            part.data = part.data.clone()
            assert weight_addresses(model) != before
            before = weight_addresses(model)
    model.vision_tower.encoder.layers[0].mlp.fc1 = nn.Linear(32, 64)
    assert weight_addresses(model) != before


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_replay_is_what_the_model_gives(backend):
    """What the kernels give in a graph is what PyTorch gives without one."""
    model = copy.deepcopy(tiny.pair("next").ours).to("cuda")
    graphs = EncodeGraphs(model)

    def check(batch):
        with use_backend(backend):
            found = graphs(batch)
        with torch.no_grad(), use_backend("reference"):
            torch.testing.assert_close(found, model.inputs_embeds(batch), rtol=1e-4, atol=1e-5)

    for batch in [*batches(model), *batches(model)]:
        check(batch)
    captured = len(graphs.captured)
    model.projector.layers[0].weight.data = model.projector.layers[0].weight.data * 2
    check(batch)
    assert len(graphs.captured) == captured
