"""The parity matrix of `accelerate`: which combinations are compared with the stock model, and how closely.

FLOAT32 and HALF are pairwise coverings, not every product of all columns: every two values of different columns that
can go together share a row (checked below). docs/huggingface.md says what lies outside the tables, and where that is
tested.
"""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

import llava_fast
from llava_fast.accelerated import patch
from llava_fast.accelerated.replacement import put_back
from llava_fast.models.fused import gate
from tests.support import tiny
from tests.support.against_stock import (
    assert_close,
    assert_same_gradients,
    assert_same_outputs,
    assert_same_tokens,
    batch,
    gradients,
)

MIXES = {"one": "a", "mixed": "a none two large", "text": "none", "films": "both none film"}
TOKENS = {"greedy": {}, "beams": {"num_beams": 2}, "sampled": {"do_sample": True}}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}
LIST = [-2, -1]
"""A list of feature layers, which takes the stock path."""
METHODS = ("forward", "get_image_features", "get_video_features")
VISUAL = [tiny.IMAGE_ID, tiny.VIDEO_ID]
"""Tokens that no answer may hold: without a cache they would be asked for features."""

FLOAT32 = """
model                mix    side   layer  parts    cache    tokens
llava15              mixed  right  -2     decoder  static   greedy
llava15              one    left   1      images   dynamic  sampled
llava15              mixed  right  -1     loss     none     beams
llava15              mixed  right  -2     all      dynamic  greedy
llava15_full         one    right  -1     images   dynamic  beams
llava15_full         mixed  left   1      decoder  dynamic  greedy
llava15_full         one    right  -2     loss     static   sampled
llava15_full         one    left   1      all      none     beams
next                 mixed  right  1      all      dynamic  sampled
next                 one    left   -1     images   none     greedy
next                 one    left   -2     loss     static   beams
next                 one    left   1      decoder  dynamic  sampled
next_mistral_window  mixed  right  -1     loss     none     sampled
next_mistral_window  one    left   1      all      static   beams
next_mistral_window  one    left   -2     decoder  dynamic  greedy
next_mistral_window  mixed  left   1      images   dynamic  sampled
next_qwen            mixed  right  -1     all      none     beams
next_qwen            one    left   -2     loss     dynamic  beams
next_qwen            one    left   1      images   static   sampled
next_qwen            one    left   -2     decoder  static   greedy
next_biases          mixed  left   -1     loss     static   beams
next_biases          one    right  1      decoder  static   sampled
next_biases          one    right  -2     images   dynamic  greedy
next_biases          one    right  -2     all      none     greedy
video                one    left   -2     all      none     greedy
video                mixed  right  -1     images   static   greedy
video                films  left   1      loss     dynamic  beams
video                one    left   1      decoder  static   sampled
video_max_odd        films  left   -1     decoder  static   beams
video_max_odd        mixed  right  -2     images   none     sampled
video_max_odd        one    right  1      loss     dynamic  greedy
video_max_odd        mixed  left   -2     all      none     beams
onevision            films  right  1      loss     dynamic  greedy
onevision            mixed  left   -2     decoder  none     beams
onevision            one    right  1      all      static   sampled
onevision            mixed  right  -1     images   none     greedy
onevision_window     films  left   1      images   none     sampled
onevision_window     films  right  -2     all      dynamic  greedy
onevision_window     one    left   -2     loss     static   beams
onevision_window     mixed  right  -1     decoder  static   beams
"""

HALF = """
model                dtype     mix    side   layer  parts
llava15              float16   one    left   1      images
llava15              bfloat16  one    right  -1     loss
llava15              float16   mixed  left   -2     all
llava15              bfloat16  one    left   -2     decoder
next_mistral_window  float16   mixed  left   -2     decoder
next_mistral_window  bfloat16  one    right  1      all
next_mistral_window  float16   mixed  left   -1     images
next_mistral_window  float16   one    right  -1     loss
next_qwen            bfloat16  mixed  right  -1     images
next_qwen            float16   one    left   -2     loss
next_qwen            bfloat16  one    right  1      all
next_qwen            float16   mixed  right  -2     decoder
video                bfloat16  one    right  -2     decoder
video                float16   films  left   1      loss
video                float16   films  right  -1     decoder
video                bfloat16  mixed  right  -1     all
video                bfloat16  films  left   -1     images
onevision            bfloat16  films  left   -1     all
onevision            float16   mixed  right  1      loss
onevision            bfloat16  films  right  -2     images
onevision            bfloat16  one    right  1      decoder
"""

EDGES = """
model                mix    side   layer  parts   cache    tokens
llava15              one    left   list   all     dynamic  greedy
llava15_full         text   right  -2     all     static   beams
next                 mixed  right  list   all     none     sampled
next_mistral_window  text   right  -2     loss    dynamic  beams
next_qwen            text   left   -2     all     dynamic  sampled
next_biases          text   right  -2     images  none     greedy
video                films  left   list   all     static   greedy
onevision            mixed  right  list   images  dynamic  beams
onevision_window     text   left   -2     all     static   greedy
"""
"""Text alone and lists of feature layers: they leave out the very parts that the other columns are about."""


def rows(table: str) -> list[dict[str, str]]:
    names, *lines = (line.split() for line in table.strip().splitlines())
    return [dict(zip(names, line, strict=True)) for line in lines]


def cells(table: str):
    return [pytest.param(row, id=" ".join(row.values())) for row in rows(table)]


@pytest.mark.parametrize("table", [FLOAT32, HALF], ids=["float32", "half"])
def test_every_pair_of_values_is_in_the_table(table):
    found = rows(table)
    values = {name: {row[name] for row in found} for name in found[0]}
    for one, other in itertools.combinations(values, 2):
        for pair in itertools.product(values[one], values[other]):
            frames = dict(zip((one, other), pair, strict=True))
            if frames.get("mix") == "films" and not frames.get("model", "video").startswith(("video", "onevision")):
                continue  # these have no videos
            assert any((row[one], row[other]) == pair for row in found), (one, other, pair)


def pair(row: dict[str, str]) -> tuple[nn.Module, nn.Module]:
    """(stock, with only those parts replaced that the row names)."""
    case = tiny.CASES[row["model"]]
    layer = LIST if row["layer"] == "list" else int(row["layer"])
    case = dataclasses.replace(case, options=case.options | {"vision_feature_layer": layer})
    stock, model = tiny.hf_model(case), llava_fast.accelerate(tiny.hf_model(case))
    parts = {"loss": [model], "images": [model.model], "decoder": list(model.model.language_model.modules())}
    kept = parts.get(row["parts"], [module for part in parts.values() for module in part])
    for module, name, *_ in list(patch._replacements(model)):
        if name in METHODS and not any(module is each for each in kept):
            put_back(module, name)
    return stock, model


@pytest.fixture
def told(caplog):
    """What was said of the stock path, so far."""
    return lambda: {record.message for record in caplog.records if "stock path" in record.message}


@pytest.mark.parametrize("row", cells(FLOAT32) + cells(EDGES))
def test_float32(row, told, monkeypatch):
    monkeypatch.setattr(gate, "LEAST", 1)
    stock, model = pair(row)
    inputs = batch(row["model"], MIXES[row["mix"]], row["side"], labels=True)
    cache = {} if row["cache"] != "none" else {"use_cache": False}
    (out, found), (expected_out, expected) = gradients(model, inputs, **cache), gradients(stock, inputs, **cache)
    assert list(out) == list(expected_out)
    assert_close("matrix loss", out.loss, expected_out.loss, 1e-5)
    assert_close("matrix logits", out.logits, expected_out.logits, 1e-5)
    assert_same_gradients("matrix gradients", found, expected)
    del inputs["labels"]
    assert_same_outputs(model, stock, inputs, **cache)
    how = {"max_new_tokens": 5} | CACHES[row["cache"]] | TOKENS[row["tokens"]]
    assert_same_tokens(model, stock, inputs, suppress_tokens=VISUAL, **how)
    falls_back = row["layer"] == "list" and row["mix"] != "text" and row["parts"] in ("all", "images")
    why = f"the image path takes the stock path: a list of feature layers is asked for ({LIST})"
    assert told() == ({why} if falls_back else set())


@pytest.mark.parametrize("row", cells(HALF))
def test_half_precision(row, told, monkeypatch):
    """Errors against float64 of the logits, and of all gradients together, are at most twice the stock model's."""
    monkeypatch.setattr(gate, "LEAST", 1)
    stock, model = pair(row)
    exact = pair(row)[0].double()
    inputs = batch(row["model"], MIXES[row["mix"]], row["side"], labels=True)

    def cast(dtype):
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    truth, right = gradients(exact, cast(torch.float64))
    dtype, errors = getattr(torch, row["dtype"]), []
    for each in (model, stock):
        out, found = gradients(each.to(dtype), cast(dtype))
        assert out.logits.dtype == dtype
        wrong = [(found[k].double() - right[k]).norm() for k in right if right[k] is not None and right[k].any()]
        errors.append(torch.stack([(out.logits.double() - truth.logits).norm(), torch.stack(wrong).norm()]))
    assert (errors[0] <= 2 * errors[1]).all(), errors
    assert not told()
