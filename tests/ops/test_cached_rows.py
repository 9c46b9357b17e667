"""Keys and values cached in 8 bits: the form of a row, the compiled step over it, and generation."""

from __future__ import annotations

import pytest
import torch

import llava_fast
from llava_fast import _C
from llava_fast.errors import QuantisationError
from llava_fast.models.paged_cache import BlockTable, PagedCache
from llava_fast.ops import use_backend
from llava_fast.ops.cached_rows import dequantise_rows, quantise_rows
from llava_fast.ops.decoder_step import DecoderWeights, decoder_step
from tests.ops.test_decoder_step import SHAPES, operands, rows_in
from tests.support import tiny

EIGHTS = [shape for shape, options in SHAPES.items() if options.get("head_dim", 16) % 8 == 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_rounded_to_the_nearest_code(dtype):
    rows = (torch.randn(5, 3, 16) * torch.logspace(-3, 3, 5)[:, None, None]).to(dtype)
    stored = quantise_rows(rows)
    assert stored.shape == (5, 3, 20)
    assert stored.dtype == torch.int8
    scale = stored[..., 16:].contiguous().view(torch.float32)
    assert torch.equal(scale, rows.float().abs().amax(-1, keepdim=True) / 127)
    assert ((dequantise_rows(stored, torch.float64) - rows.double()).abs() <= scale.double() * 0.500001).all()
    assert dequantise_rows(stored, dtype).dtype == dtype


def test_zeros_and_values_that_are_not_finite():
    rows = torch.zeros(4, 8)
    rows[1, 3], rows[2, 5], rows[3, 0] = torch.nan, torch.inf, 1e-44
    back = dequantise_rows(quantise_rows(rows), torch.float32)
    assert (back[[0, 3]] == 0).all()
    assert back[1:3].isnan().all()


def in_codes(segments: list[torch.Tensor]) -> list[torch.Tensor]:
    return [quantise_rows(segment) for segment in segments]


def without_new_rows(weights: DecoderWeights) -> DecoderWeights:
    """The same decoder with keys and values of zero, which both kinds of cache hold exactly."""
    zeros = dict.fromkeys(("k_bias", "v_bias"))
    layers = [
        layer._replace(k=torch.zeros_like(layer.k), v=torch.zeros_like(layer.v), **zeros) for layer in weights.layers
    ]
    return DecoderWeights(layers, weights.norm, weights.head_dim, weights.eps, weights.windows)


@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize("shape", EIGHTS)
def test_the_step_over_codes_is_that_over_the_rows_they_stand_for(shape, level, monkeypatch):
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    before = [0, 70, 17, 4]
    x, weights, cos, sin, segments, tables, _ = operands(shape, before)
    weights, codes = without_new_rows(weights), in_codes(segments)
    rows = [dequantise_rows(segment, torch.float32) for segment in codes]
    got = decoder_step(x, weights, cos, sin, codes, tables, before)
    assert got.isfinite().all()
    assert torch.equal(got, decoder_step(x, weights, cos, sin, rows, tables, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", _C.simd_levels())
@pytest.mark.parametrize("shape", ["grouped heads", "windows", "biases"])
def test_the_step_writes_its_row_as_the_reference_does(shape, level, dtype, monkeypatch):
    monkeypatch.setenv("LLAVA_FAST_SIMD", level)
    before = [0, 17, 4]
    x, weights, cos, sin, segments, tables, _ = operands(shape, before, dtype)
    mine, theirs = in_codes(segments), in_codes(segments)
    got = decoder_step(x, weights, cos, sin, mine, tables, before)
    with use_backend("reference"):
        wanted = decoder_step(x, weights, cos, sin, theirs, tables, before)
    tolerance = 0.02 if dtype == torch.float32 else 0.06  # a code may be rounded the other way
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())
    for table, at in zip(tables, before, strict=True):
        one, other = (dequantise_rows(rows_in(found, table, at + 1)[at], torch.float32) for found in (mine, theirs))
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())
        for found in (mine, theirs):
            rows_in(found, table, at + 1)[at].zero_()
    changed = in_codes(segments)
    for table, at in zip(tables, before, strict=True):
        rows_in(changed, table, at + 1)[at].zero_()
    for one, other in zip(mine, changed, strict=True):
        assert torch.equal(one, other)  # no other row was touched


@pytest.mark.parametrize("block_rows", [4, 32])
def test_the_cache_returns_the_rows_that_its_codes_stand_for(block_rows):
    dense, codes = (
        PagedCache(2, 2, 8, torch.float32, torch.device("cpu"), 1 << 20, block_rows=block_rows, codes=kind)
        for kind in (None, "int8")
    )
    assert codes.block_bytes < 0.4 * dense.block_bytes
    rows = torch.randn(2, 2, 9, 8)
    after = torch.randn(2, 2, 2, 8)  # of two sequences
    tables = [BlockTable(codes), BlockTable(codes)]
    for grown in range(1, 11):
        for table in tables:
            table.reserve(grown)
    for table in tables:
        keys, values = codes.append(1, table, 0, *rows)
    wanted = dequantise_rows(quantise_rows(rows), torch.float32)
    assert torch.equal(torch.stack([keys, values]), wanted)
    keys, values, mask = codes.append_one_each(1, tables, (9, 9), *after, None)
    assert mask is None
    assert torch.equal(keys[:, :, :9], wanted[0].expand(2, -1, -1, -1))
    assert torch.equal(values[:, :, 9], dequantise_rows(quantise_rows(after[1]), torch.float32))


def test_a_model_answers_from_codes():
    """Nearly the tokens of an exact cache; the same ones in a batch, alone, streamed, and with a reused prefix."""
    model = llava_fast.load("llava_fast/demo_model", kv_cache="int8")
    assert model.decoder.new_cache().codes == "int8"
    assert llava_fast.load("llava_fast/demo_model").decoder.new_cache().codes is None
    requests = [
        {"prompt": "<image>hello there", "images": [tiny.picture(70, 90)]},
        {"prompt": "and no picture at all, but a prompt that is longer"},
    ]
    together = model.generate(requests, max_new_tokens=24, ignore_eos=True)
    for request, answer in zip(requests, together, strict=True):
        assert model.generate([request], max_new_tokens=24, ignore_eos=True)[0].token_ids == answer.token_ids
        streamed = model.stream(request, max_new_tokens=24, ignore_eos=True)
        assert "".join(streamed) == answer.text


def test_what_cannot_be_kept_in_codes_is_said(monkeypatch):
    with pytest.raises(QuantisationError, match="kv_cache is 'int4': use 'int8' or None"):
        llava_fast.load("llava_fast/demo_model", kv_cache="int4")
    with pytest.raises(ValueError, match="heads of 12 elements are not cached in 8 bits"):
        PagedCache(2, 2, 12, torch.float32, torch.device("cpu"), codes="int8")
    with pytest.raises(ValueError, match="use 'int8' or None"):
        PagedCache(2, 2, 8, torch.float32, torch.device("cpu"), codes="fp8")
