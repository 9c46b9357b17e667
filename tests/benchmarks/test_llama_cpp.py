"""llama.cpp as a peer of the benchmarks, without llama.cpp: its options, its output, and quantised rows."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import llama_cpp
from benchmarks.case import Peer, PeerTimes, Settings, measure
from benchmarks.machine import Ceilings
from benchmarks.run import app
from benchmarks.subject import Subject
from benchmarks.suites import SUITES
from llava_fast.models.quantised import Quantisation, quantise_model

CEILINGS = Ceilings(1e10, 1e11)
TEST = {"build_commit": "abc123", "build_number": 7, "model_size": 1000, "samples_ns": [2_000_000_000, 1_000_000_000]}
BENCH = ["--llama-bench", sys.executable]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--quantize", "int2"], "choose from none, int8, int4"),
        (["decode", "--quantize", "int8"], "hf-eager does not run rounded weights"),
        (["encode", "--quantize", "int8", "--backend", "llava_fast"], "only of prefill, decode, generate"),
        (["decode", "--group", "32"], "needs --quantize"),
        (["decode", "--quantize", "int4", "--group", "7", "--backend", "llava_fast"], "--group"),
        (["decode", "--backend", "llava_fast,llama.cpp"], "needs --llama-bench PATH"),
        (["decode", "--backend", "llava_fast,llama.cpp", "--llama-bench", "nowhere"], "there is no file nowhere"),
        (["decode", "--backend", "llama.cpp", *BENCH], "add llava_fast"),
        (["decode", "--backend", "llava_fast,llama.cpp", *BENCH, "--batch-size", "2"], "--batch-size 1"),
        (["prefill", "--backend", "llava_fast,llama.cpp", *BENCH], "prefill with --text-rows"),
        (["encode", "--backend", "llava_fast,llama.cpp", *BENCH], "runs decode, generate, and prefill"),
    ],
)
def test_wrong_options_say_what_is_right(arguments, message, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("\u2502", " ").split())


def test_a_missing_package_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["decode", "--backend", "llava_fast,llama.cpp", *BENCH])
    assert result.exit_code == 2
    assert "llava_fast[llama-cpp]" in result.output


def test_output_of_llama_bench():
    assert llama_cpp.parse(json.dumps([TEST])) == PeerTimes([2.0, 1.0], 1000, {"llama.cpp": "abc123 (7)"})


@pytest.mark.parametrize("text", ["", "warning: x", "[]", "{}", "[{}]", json.dumps([TEST, TEST]), "[1]"])
def test_other_output_is_refused(text):
    with pytest.raises(ValueError, match="no result of one test"):
        llama_cpp.parse(text)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="no samples"):
        llama_cpp.parse(json.dumps([TEST | {"samples_ns": []}]))


def test_programs_that_fail_are_named():
    with pytest.raises(ValueError, match="exit code 3: bad model"):
        llama_cpp._output_of([sys.executable, "-c", "import sys; print('bad model', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(ValueError, match="/nowhere/llama-bench does not start"):
        llama_cpp._output_of(["/nowhere/llama-bench"])


def test_command_and_format(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(llama_cpp, "_output_of", lambda command: ran.append(command) or json.dumps([TEST]))
    backends = ("llava_fast", "llama.cpp")
    settings = Settings(backends=backends, quantize="int8", threads=2, iters=3, gguf_dir=tmp_path, llama_bench=tmp_path)
    (tmp_path / "wide-2-layers-q8_0.gguf").touch()
    subject = SimpleNamespace(label="wide, 2 layers")
    (peer,) = llama_cpp.peers(subject, settings, new_tokens=16, context=8)
    assert peer.backend == "llama.cpp q8_0"
    assert peer.run().seconds == [2.0, 1.0]
    (command,) = ran
    given = dict(zip(command[1::2], command[2::2], strict=True))
    assert given["--model"].endswith("wide-2-layers-q8_0.gguf")
    numbers = [int(given[f"--{name}"]) for name in ("threads", "repetitions", "n-gen", "n-depth", "n-prompt")]
    assert numbers == [2, 3, 16, 8, 0]
    assert llama_cpp.peers(subject, Settings(), prompt=8) == []
    (peer,) = llama_cpp.peers(subject, settings, prompt=7, new_tokens=16)
    peer.run()
    assert ran[1][-6:] == ["--n-prompt", "0", "--n-gen", "0", "-pg", "7,16"]


def test_rows_are_interleaved_for_llama_cpp():
    """Rotating neighbours of the turned rows is rotating halves of a head of the rows as they were."""
    rows = torch.arange(16.0)[:, None]
    turned = llama_cpp._interleaved(rows, heads=2)[:, 0].tolist()
    assert turned == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


@pytest.mark.parametrize("suite", ["decode", "prefill", "generate"])
def test_quantised_rows_beside_a_peer(suite, monkeypatch):
    told = PeerTimes([2.0, 1.0, 3.0], 1000, {"llama.cpp": "abc123 (7)"})
    monkeypatch.setattr(llama_cpp, "peers", lambda *given, **more: [Peer("llama.cpp q8_0", lambda: told)])
    subject = Subject("tiny", None, torch.float32, "cpu", Quantisation("int8"))
    settings = Settings(
        backends=("llava_fast", "llama.cpp"), quantize="int8", new_tokens=3, context=5, text_rows=9, iters=1, warmup=0
    )
    (case,) = SUITES[suite].cases(subject, settings)
    ours, theirs = measure(case, settings, CEILINGS)
    assert "hf" not in subject.__dict__  # the floating-point model is never whole
    float_bytes = sum(value.nbytes for value in subject.hf.parameters())
    assert ours.backend == "llava_fast"
    assert ours.weight_bytes < float_bytes
    assert 1 < subject.decoder_itemsize < 1.1
    assert (theirs.median, theirs.samples, theirs.weight_bytes) == (2.0, 3, 1000)
    assert theirs.versions == {"llama.cpp": "abc123 (7)"}
    assert theirs.ratio is theirs.check is ours.ratio is None
    assert "llama_bench" not in ours.settings
    subject.close()


def test_a_quantised_shape_has_the_weights_of_the_floating_point_one():
    dense, ours = (
        Subject("tiny", None, torch.float32, "cpu"),
        Subject("tiny", None, torch.float32, "cpu", Quantisation("int4")),
    )
    wanted = quantise_model(dense.ours, Quantisation("int4")).state_dict()
    found = ours.ours.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    dense.close()
    ours.close()


def test_prefill_of_text_agrees_with_transformers():
    subject, settings = Subject("tiny", None, torch.float32, "cpu"), Settings(text_rows=20, batch_size=2)
    (case,) = SUITES["prefill"].cases(subject, settings)
    ours, theirs = (provider.run(1) for provider in case.providers)
    assert case.check(ours, theirs).passed
    assert not case.check(ours, theirs.flip(0)).passed
    subject.close()
