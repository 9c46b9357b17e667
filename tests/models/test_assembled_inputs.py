"""inputs_embeds by one op, where a kernel backend is asked for, against the same step by step."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from llava_fast.inputs.plan.buckets import bucket_of
from llava_fast.models import encode
from llava_fast.models.encode_graphs import filled_batch
from llava_fast.ops import gemm, use_backend
from tests.support import tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Features(nn.Module):
    """In the tower's place: the same features at each call, so that the tower's own kernels need not run."""

    def __init__(self, features):
        super().__init__()
        self.features = nn.Parameter(features)

    def forward(self, tiles, count=None):
        return self.features


@pytest.fixture
def case(monkeypatch):
    """(model, batch, how often the op was called); the model is the test's own."""
    model = copy.deepcopy(tiny.pair("next").ours)  # it moves to the GPU where there is one
    image = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    requests = [{"prompt": "<image>\nhello the", "images": [image]}, {"prompt": "hello"}]
    with torch.no_grad():
        batch = model.prepare(requests, layout="padded")
        monkeypatch.setitem(model._modules, "vision_tower", Features(model.vision_tower(batch.tiles)))
    calls = []
    whole = encode.assemble_inputs
    monkeypatch.setattr(encode, "assemble_inputs", lambda *args: calls.append(1) or whole(*args))
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
    assert calls == [1]
    assert len(found) >= 8
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_padding_of_a_bucket_changes_nothing(case):
    model, batch, calls = case
    bucket = bucket_of(batch.plan)
    filled = filled_batch(batch, bucket)
    assert len(filled.plan.column("kept")) > len(batch.plan.column("kept"))
    with use_backend("triton"), torch.no_grad():
        expected, found = model.inputs_embeds(batch), model.inputs_embeds(filled)
    assert len(calls) == 2
    assert len(found) == bucket.rows
    assert torch.equal(found[: len(expected)], expected)
    assert not found[len(expected) :].any()


def test_a_bucket_says_how_many_tiles_and_rows_are_real(case):
    _model, batch, _ = case
    assert batch.count("tile") is None
    assert batch.count("kept") is None
    filled = filled_batch(batch, replace(bucket_of(batch.plan), tiles=batch.plan.tiles + 2))
    assert filled.count("tile").tolist() == [batch.plan.tiles]
    assert len(filled.tiles) == batch.plan.tiles + 2
    assert filled.count("kept").tolist() == [len(batch.plan.column("kept"))]


def test_the_counts_reach_the_kernels(monkeypatch):
    """The whole path from tiles: nothing is multiplied for padding, in patch_embed and in the projector."""
    model, multiply, rows, counts = copy.deepcopy(tiny.pair("next").ours).to(DEVICE), gemm.gemm, [], []
    model.vision_tower.embeddings.register_forward_hook(lambda module, args, out: rows.append(out))
    monkeypatch.setattr(gemm, "gemm", lambda *a, **k: counts.append(k.get("count")) or multiply(*a, **k))
    with torch.no_grad():
        batch = model.prepare([{"prompt": "<image>\nhello", "images": [tiny.picture(30, 200)]}])
        tiles = len(batch.tiles)
        with use_backend("triton"):
            found = model.inputs_embeds(filled_batch(batch, replace(bucket_of(batch.plan), tiles=tiles + 2)))
        expected = model.inputs_embeds(batch)
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-5)
    assert not rows[0][tiles:].any()
    assert rows[0][:tiles].any()
    assert [c.tolist() for c in counts if c is not None] == [[len(batch.plan.column("kept"))]] * 2


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
    assert seen
    assert not calls


def test_text_alone_goes_step_by_step(case):
    model, _, calls = case
    with use_backend("triton"), torch.no_grad():
        model.inputs_embeds(model.prepare([{"prompt": "hello"}]).to(DEVICE))
    assert not calls


def test_parts_of_other_dtypes_go_step_by_step(case):
    """A tower and projector in float32 before a decoder in float16, as accelerate takes them too."""
    model, batch, calls = case
    model.decoder.half()
    expected, found = (run(model, batch, backend) for backend in ("reference", "triton"))
    assert not calls
    assert found[0].dtype == torch.float16
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3 * theirs.abs().max().item())


def test_autocast_goes_step_by_step(case):
    model, batch, calls = case
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        with use_backend("reference"):
            expected = model.inputs_embeds(batch)
        with use_backend("triton"):
            assert torch.equal(model.inputs_embeds(batch), expected)
    assert not calls
    assert expected.dtype == torch.float32
