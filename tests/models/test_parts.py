"""The model's parts against transformers' own modules and against plain restatements."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from llava_fast.generation.prefix_cache import PrefixCache
from llava_fast.models import paged_cache
from llava_fast.models.batch import Batch
from llava_fast.models.blocks.attention import Spans, attend
from llava_fast.models.connectors.mlp import Projector, ProjectorConfig
from llava_fast.models.fused import RMSNorm
from llava_fast.models.paged_cache import BlockTable, PagedCache
from llava_fast.models.towers.vit import VisionTower
from tests.support import tiny
from tests.support.parity import assert_close

# ---------------------------------------------------------------- rotary tables, norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["next", "next_qwen", "video", "next_llama3", "next_dynamic_rope"])
def test_rotary_tables_are_transformers_to_the_bit(name, dtype):
    pair, rows = tiny.pair(name), 6000
    position = torch.arange(rows)
    theirs = LlamaRotaryEmbedding(pair.hf.config.text_config)
    cos, sin = theirs(torch.zeros(1, dtype=dtype), position[None])
    ours_cos, ours_sin = pair.ours.decoder.rope(position, dtype, Spans((0,), (rows,)))
    assert torch.equal(ours_cos[:, 0], cos[0])
    half = sin.shape[-1] // 2  # ours carries the sign of the rotated half
    assert torch.equal(ours_sin[:, 0, half:], sin[0, :, half:])
    assert torch.equal(-ours_sin[:, 0, :half], sin[0, :, :half])


def test_rms_norm_rounds_as_transformers():
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = RMSNorm(96, 1e-5).to(dtype), LlamaRMSNorm(96, 1e-5).to(dtype)
        weight = torch.randn(96).to(dtype)
        ours.weight.data, theirs.weight.data = weight, weight
        x = (torch.randn(50, 96) * 3).to(dtype)
        found, expected = ours(x), theirs(x)
        assert found.dtype == dtype
        if dtype == torch.bfloat16:
            assert (found != expected).float().mean() < 0.01  # a last bit, where float32 sums run in another order
        torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)


# ---------------------------------------------------------------- attention


def dense_attention(query, key, value, window):
    """[n, H, D] over [m, K, D], the queries last: softmax written out."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query, key) / math.sqrt(query.shape[2])
    n, m = scores.shape[1:]
    position, at = torch.arange(m - n, m)[:, None], torch.arange(m)[None]
    hidden = at > position
    if window is not None:
        hidden |= at <= position - window
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value).flatten(1)


def scattered_cache(blocks: str, before, lengths) -> tuple[PagedCache, tuple[BlockTable, ...]]:
    """A cache of one layer and tables with room for these rows; "one run" each, or in blocks of 4 rows "scattered"
    over several segments."""
    block_rows = 32 if blocks == "one run" else 4
    cache = PagedCache(1, 2, 8, torch.float32, torch.device("cpu"), 1 << 20, block_rows=block_rows)
    tables = tuple(BlockTable(cache) for _ in before)
    for rows in range(1, 1 + max(b + n for b, n in zip(before, lengths, strict=True))):
        for table, b, n in zip(tables, before, lengths, strict=True):
            table.reserve(min(rows, b + n))
    assert all((len(table.runs) == 2) == (blocks == "one run" or len(table.blocks) == 1) for table in tables)
    assert len(cache.segments) == 1 if blocks == "one run" else len(cache.segments) > 1
    return cache, tables


def test_kept_blocks_come_back_where_more_may_be_kept_than_there_is_memory():
    cache = PagedCache(1, 2, 8, torch.float32, torch.device("cpu"), max_bytes=4 * 4096, keep_bytes=1 << 30)
    prefixes = PrefixCache(cache)
    for first in range(0, 4000, 1000):  # four prompts of two blocks: two of them fill the cache
        table = BlockTable(cache)
        table.reserve(64)
        prefixes.insert(list(range(first, first + 64)), table.blocks, 64, running=False)
        table.release()
    assert cache.blocks == cache.max_blocks == 4


@pytest.mark.parametrize("blocks", ["one run", "scattered"])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("layout", ["packed", "dense", "padded", "cached", "one row each"])
def test_attention_stays_inside_each_sequence(layout, window, blocks, monkeypatch):
    if blocks == "scattered":
        monkeypatch.setattr(paged_cache, "SMALLEST_SEGMENT", 1)
    lengths, before = (5, 1, 9), (0, 0, 0)
    if layout in ("cached", "one row each"):
        before = (3, 0, 12)
    if layout == "one row each":
        lengths = (1, 1, 1)
    stride = [max(lengths)] * 3 if layout in ("dense", "padded") else lengths
    starts = tuple(int(start) for start in np.cumsum([0, *stride])[:-1])
    rows = int(sum(stride))
    query, key, value = torch.randn(rows, 4, 8), torch.randn(rows, 2, 8), torch.randn(rows, 2, 8)
    old = [(torch.randn(count, 2, 8), torch.randn(count, 2, 8)) for count in before]
    cache, tables = None, ()
    if layout in ("cached", "one row each"):
        cache, tables = scattered_cache(blocks, before, lengths)
        # A row that was never written must not count; where a mask hides it, a NaN would still be multiplied by 0.
        for segment in cache.segments:
            segment.fill_(torch.nan if layout == "cached" else 7.0)
        for table, (old_key, old_value) in zip(tables, old, strict=True):
            cache.append(0, table, 0, old_key.transpose(0, 1), old_value.transpose(0, 1))
    dense = (3, max(lengths)) if layout == "dense" else None
    spans = Spans(starts, lengths, tables, before, dense)
    out = attend(query, key, value, spans, 0, cache, window)
    assert out.shape == (rows, 32)
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        mine = slice(start, start + length)
        keys, values = (torch.cat([o, new[mine]]) for o, new in zip(old[number], (key, value), strict=True))
        torch.testing.assert_close(out[mine], dense_attention(query[mine], keys, values, window))
        if cache is not None:
            none = key[:0].transpose(0, 1)
            stored, _ = cache.append(0, tables[number], before[number] + length, none, none)
            assert torch.equal(stored.transpose(0, 1), keys)
    if layout == "padded":
        assert not out[1 * 9 + 1 : 2 * 9].any()


# ---------------------------------------------------------------- projectors, towers


def test_projectors_are_the_originals_modules():
    sizes = {"in_features": 6, "out_features": 10}
    x = torch.randn(7, 6)
    expected = {
        "linear": [nn.Linear(6, 10)],
        "mlp": [nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 10), nn.GELU(), nn.Linear(10, 10)],
        "yi": [nn.Linear(6, 10), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, 10), nn.LayerNorm(10)],
        "identity": [],
    }
    for kind, steps in expected.items():
        reference = nn.Sequential(*steps)
        ours = Projector(ProjectorConfig(kind=kind, depth=3 if kind == "mlp" else 2, **sizes))
        ours.layers.load_state_dict(reference.state_dict())  # the same numbering
        torch.testing.assert_close(ours(x), reference(x))


@pytest.mark.parametrize("name", ["llava15", "llava15_full", "llava15_layers", "next_first_layer", "onevision"])
def test_the_tower_gives_the_selected_hidden_states(name):
    pair = tiny.pair(name)
    tiles = torch.from_numpy(pair.ours.processor.tiles(tiny.picture(60, 90)))
    config = pair.ours.config.vision
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
    pixels = (tiles.float() / 255 - mean) / std
    with torch.no_grad():
        states = pair.hf.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        layers = pair.hf.config.vision_feature_layer  # the class row is among the rows, whether or not it is kept
        layers = [layers] if isinstance(layers, int) else layers
        expected = torch.cat([states[layer] for layer in layers], dim=-1)
        assert_close("tower", pair.ours.vision_tower(tiles), expected)
        assert_close("tower", pair.ours.vision_tower(pixels), expected)  # already normalised


def test_layers_above_the_selected_one_do_not_run():
    tower = tiny.pair("next").ours.vision_tower
    assert tower.config.layers_needed == 2
    assert len(tower.encoder.layers) == 3
    deep = VisionTower(dataclasses.replace(tower.config, feature_layers=(-1, 0)))
    assert deep.config.layers_needed == 3
    assert deep.config.feature_size == 2 * tower.config.hidden_size


# ---------------------------------------------------------------- whole models


def request() -> dict:
    return {"prompt": "hello <image> the end", "images": [tiny.picture(60, 90)]}


def test_normalised_float_tiles_may_be_given():
    model = tiny.pair("next").ours
    batch = model.prepare([request()])
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (model.config.vision.image_mean, model.config.vision.image_std)
    )
    normalised = Batch((batch.tiles.float() / 255 - mean) / std, batch.plan, batch.flat)
    with torch.no_grad():
        assert_close("float tiles", model(normalised).logits, model(batch).logits)


@pytest.mark.parametrize("name", ["llava15", "next", "next_qwen", "onevision"])
def test_bfloat16_is_as_exact_as_transformers(name):
    """Against float64, the error is at most twice that of transformers in bfloat16."""
    import copy

    pair, inputs = tiny.pair(name), tiny.pair(name).reference_inputs(**request())
    with torch.no_grad():
        exact = copy.deepcopy(pair.hf).double()(**cast(inputs, torch.float64)).logits[0]
        theirs = copy.deepcopy(pair.hf).bfloat16()(**cast(inputs, torch.bfloat16)).logits[0]
        model = copy.deepcopy(pair.ours).bfloat16()
        ours = model(model.prepare([request()]), logits="all").logits
    assert ours.dtype == torch.bfloat16
    ours_error, their_error = ((found.double() - exact).square().mean().sqrt() for found in (ours, theirs))
    assert ours_error <= 2 * their_error


def test_a_model_can_change_its_dtype_after_use():
    import copy

    model = copy.deepcopy(tiny.pair("next").ours)
    with torch.no_grad():
        first = model(model.prepare([request()]), logits="all").logits
        model.double()
        double = model(model.prepare([request()]), logits="all").logits
        assert double.dtype == torch.float64
        assert (first - double).abs().max() < 1e-4 * double.abs().max()
        generated = model.generate([request()], max_new_tokens=8, ignore_eos=True)[0].token_ids
        model.float()
        assert torch.equal(model(model.prepare([request()]), logits="all").logits, first)
    assert generated == tiny.pair("next").ours.generate([request()], max_new_tokens=8, ignore_eos=True)[0].token_ids


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}


def test_the_same_batch_gives_the_same_bits():
    model = tiny.pair("onevision").ours
    batch = model.prepare([request(), {"prompt": "text"}])
    with torch.no_grad():
        assert torch.equal(model(batch, logits="all").logits, model(batch, logits="all").logits)


def test_an_empty_batch_has_no_logits():
    model = tiny.pair("next").ours
    with torch.no_grad():
        for layout in ("packed", "padded"):
            assert model(model.prepare([], layout=layout)).logits.shape == (0, tiny.VOCABULARY)


def test_rope_kinds_of_the_cases_are_all_there():
    kinds = {tiny.pair(name).ours.config.decoder.rope.kind for name in tiny.CASES}
    assert kinds == {"default", "linear", "dynamic", "llama3"}
    assert LlamaConfig().rope_parameters["rope_type"] == "default"
