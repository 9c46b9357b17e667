"""inputs_embeds by one op, where a kernel backend is asked for, against the same step by step."""

import copy

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from llava_fast.inputs.buckets import bucket_of
from llava_fast.models import llava
from llava_fast.models.encode_graphs import filled_batch
from llava_fast.ops import use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Features(nn.Module):
    """In the tower's place: the same features at each call, so that the tower's own kernels need not run."""

    def __init__(self, features):
        super().__init__()
        self.features = nn.Parameter(features)

    def forward(self, tiles, all_rows):
        assert all_rows
        return self.features


@pytest.fixture
def case(monkeypatch):
    """(model, batch, how often the op was called); the model is the test's own."""
    model = copy.deepcopy(tiny.pair("next").ours)  # it moves to the GPU where there is one
    image = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    requests = [{"prompt": "<image>\nhello the", "images": [image]}, {"prompt": "hello"}]
    with torch.no_grad():
        batch = model.prepare(requests, layout="padded")
        monkeypatch.setitem(model._modules, "vision_tower", Features(model.vision_tower(batch.tiles, all_rows=True)))
    calls = []
    whole = llava.assemble_inputs
    monkeypatch.setattr(llava, "assemble_inputs", lambda *args: calls.append(1) or whole(*args))
    return model.to(DEVICE), batch.to(DEVICE), calls


def run(model, batch, backend):
    parts = {n: p for n, p in model.named_parameters() if not n.startswith("decoder.layers") and "norm" not in n}
    parts = {n: p for n, p in parts.items() if "lm_head" not in n}
    with use_backend(backend):
        out = model.inputs_embeds(batch)
        gradients = torch.autograd.grad(out.square().sum(), list(parts.values()))
    return [out, *gradients]


def test_one_op_gives_what_the_steps_give(case):
    model, batch, calls = case
    expected = run(model, batch, "reference")
    assert not calls
    found = run(model, batch, "triton")
    assert calls == [1] and len(found) >= 8
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", ["next", "llava15_full", "onevision", "video"])
def test_projected_rows_are_those_the_tower_keeps_and_nothing_is_copied(name):
    """With a class row that is dropped, kept, or not there; mixed after the projector, or before."""
    model = tiny.pair(name).ours
    film = {"prompt": "<video>\nhello", "video": [tiny.picture(40, 60)] * 2}
    request = film if name == "video" else {"prompt": "<image>\nhello", "images": [tiny.picture(40, 90)]}
    made = []

    def tower(module, args, kwargs, out):
        made.append(out)

    handle = model.vision_tower.register_forward_hook(tower, with_kwargs=True)
    with torch.no_grad():
        batch = model.prepare([request])
        features, kept = model._features(batch)
        expected = model.vision_tower(batch.tiles).flatten(0, 1)
    handle.remove()
    assert torch.equal(features[kept.long()], expected[batch.column("kept").long()])
    assert (features.data_ptr() == made[0].data_ptr()) == (name != "video")


def test_fillers_of_a_bucket_change_nothing(case):
    model, batch, calls = case
    bucket = bucket_of(batch.plan)
    filled = filled_batch(batch, bucket)
    assert len(filled.plan.column("kept")) > len(batch.plan.column("kept"))
    with use_backend("triton"), torch.no_grad():
        expected, found = model.inputs_embeds(batch), model.inputs_embeds(filled)
    assert len(calls) == 2 and len(found) == bucket.rows
    assert torch.equal(found[: len(expected)], expected) and not found[len(expected) :].any()


@pytest.mark.parametrize("what", ["layers.0", "layers.1", "layers", ""])
def test_a_hooked_projector_runs_itself(case, what):
    model, batch, calls = case
    seen = []
    hook = model.projector.get_submodule(what).register_forward_hook(lambda *_: seen.append(1))
    try:
        with use_backend("triton"), torch.no_grad():
            model.inputs_embeds(batch)
    finally:
        hook.remove()
    assert seen and not calls


def test_text_alone_goes_step_by_step(case):
    model, _, calls = case
    with use_backend("triton"), torch.no_grad():
        model.inputs_embeds(model.prepare([{"prompt": "hello"}]).to(DEVICE))
    assert not calls
