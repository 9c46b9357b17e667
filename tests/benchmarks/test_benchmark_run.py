"""The command line end to end, on the tiny shape: every suite agrees with transformers and writes its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.case import Settings
from benchmarks.run import SUITE_NAMES, app
from benchmarks.subject import Subject
from benchmarks.suites import SUITES, loss
from llava_fast.models.blocks import attention
from llava_fast.models.decoders import llama

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny():
    subject = Subject("tiny", None, torch.float32, "cpu")
    yield subject
    subject.close()


def test_all_suites_at_the_tiny_shape(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    options = ["--iters", "1", "--warmup", "0", "--image-size", "96x64", "--new-tokens", "4", "--batch-size", "2"]
    threads = torch.get_num_threads()
    done = CliRunner().invoke(app, ["all", "--model", "tiny", *options, "--output-json", str(output)])
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    rows = json.loads(output.read_text())["rows"]
    assert {row["suite"] for row in rows} == set(SUITE_NAMES)
    for row in rows:
        ours = row["backend"] != row["reference"]
        assert (row["ratio"] is not None) == ours
        assert (row["check"] is not None) == ours
        assert ours or row["backend"] in ("hf-eager", "two-pass", "padded")
        assert row["median"] > 0
        assert row["rate"] > 0
        assert row["floor_seconds"] > 0
    assert "ESTIMATE for 32 layers from 1, accelerate:" in done.output
    drawn = CliRunner().invoke(app, ["plot", str(output), str(picture)])
    assert drawn.exit_code == 0, drawn.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_it_runs_as_a_script_and_explains_itself():
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "decode", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"}, check=False)
    assert done.returncode == 0, done.stderr
    for option in "model layers image-size batch-size backend dtype warmup iters quick output-json".split():
        assert f"--{option}" in done.stdout


def test_answers_are_varied_enough_to_compare(tiny):
    settings = Settings(image_size=(96, 64), new_tokens=32)
    (case,) = SUITES["decode"].cases(tiny, settings)
    provider = case.providers[0]
    provider.prepare()
    (tokens,) = provider.run(0)
    assert len(tokens) == 32
    assert len(set(tokens)) >= 8


@pytest.mark.parametrize("suite", SUITE_NAMES)
def test_a_wrong_model_fails_the_check(tiny, suite, monkeypatch):
    """Change what each suite measures on our side only: its check must notice."""
    settings = Settings(image_size=(96, 64), new_tokens=8, answer_tokens=8)
    if suite == "preprocess":
        monkeypatch.setattr(type(tiny.processor), "tiles", wrong_tiles)
        assert not agrees(tiny, suite, settings)
        return
    if suite == "dpo":  # both sides are the same model: let answers see each other
        assert agrees(tiny, suite, settings)
        monkeypatch.setattr(attention, "_with_branches", lambda *given: [attention._causal(*given[:5])])
        assert not agrees(tiny, suite, settings)
        return
    if suite == "packing":  # here too: let packed samples see those before them
        assert agrees(tiny, suite, settings)
        right = attention.attend
        monkeypatch.setattr(llama, "attend", lambda q, k, v, spans, *rest: right(q, k, v, as_one(spans), *rest))
        assert not agrees(tiny, suite, settings)
        return
    if suite == "loss":  # our side takes the rows after those that predict
        assert agrees(tiny, suite, settings)
        right = loss.supervised_rows
        monkeypatch.setattr(loss, "supervised_rows", lambda labels: (right(labels)[0] + 1, right(labels)[1]))
        assert not agrees(tiny, suite, settings)
        return
    if suite == "accelerate":
        twin, other = tiny.hf_twin(), tiny.hf_twin()
        monkeypatch.setattr(tiny, "hf_twin", iter([twin, other] * 3).__next__)
        assert agrees(tiny, suite, settings, "accelerate")
        assert agrees(tiny, suite, settings, "accelerate, logits")
        twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight.detach().flip(0))
        assert not agrees(tiny, suite, settings, "accelerate")
        return
    linear = tiny.ours.projector.layers[2] if suite in ("encode", "train-step") else tiny.ours.decoder.lm_head
    right = linear.weight
    assert agrees(tiny, suite, settings)
    linear.weight = torch.nn.Parameter(right.detach().flip(0))  # the other side keeps its own
    try:
        assert not agrees(tiny, suite, settings)
    finally:
        linear.weight = right


def as_one(spans):
    """Packed sequences as one; padded ones as they are."""
    if spans.dense:
        return spans
    return attention.Spans((0,), (sum(spans.lengths),))


def agrees(subject, suite, settings, ours="llava_fast") -> bool:
    case = next(iter(SUITES[suite].cases(subject, settings)))
    results = {}
    for provider in case.providers:
        provider.prepare()
        results[provider.backend] = provider.result(provider.run(0))
        provider.finish()
    return case.check(results[ours], results[case.reference or "hf-eager"]).passed


def wrong_tiles(processor, image):
    from llava_fast.inputs.pictures.reading import open_image
    from llava_fast.inputs.pictures.tiles import make_tiles
    from llava_fast.inputs.tiling.anyres import image_views

    pixels = open_image(image)
    views = image_views(processor.geometry, *pixels.shape[:2], True)
    tiles = make_tiles(pixels, views, processor.geometry.tile_size).copy()
    tiles[0, 0, 0, 0] ^= 1
    return tiles


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "--image-size", "big"], "WIDTHxHEIGHT"),
        (["encode", "--dtype", "int8"], "choose from float32"),
        (["encode", "--backend", "vllm"], "choose from llava_fast"),
        (["encode", "--device", "cuda"], "no CUDA device here"),
        (["encode", "--backend", "llava_fast-graphs"], "encode --device cuda"),
        (["prefill", "--device", "cuda", "--backend", "llava_fast-graphs,hf-eager"], "encode --device cuda"),
    ],
)
def test_wrong_options_say_what_is_right(arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("\u2502", " ").split())
