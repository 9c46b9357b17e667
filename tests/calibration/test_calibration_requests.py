"""What calibration refuses, and which samples it draws. No llm-compressor is needed here."""

import functools
import json

import pytest
import torch
from typer.testing import CliRunner

import llava_fast
from llava_fast import DataError, QuantisationError
from llava_fast.calibration import run
from llava_fast.calibration.compressor import compress
from llava_fast.calibration.rows import calibration_rows
from llava_fast.cli.main import app
from llava_fast.models.quantised import Rounding, quantise_model
from tests.support import made_data, slimes, tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.save(tiny.CASES["next"], tiny.pair("next").hf, path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return llava_fast.load(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made_data.write_data(tmp_path_factory.mktemp("data"), samples=8)


def rows_of(model, data, samples=None, seed=0):
    return calibration_rows(model, data, None, samples, seed, iter)


def test_rows_are_those_of_the_model(model, data):
    """Samples are drawn by seed, and a sample's rows are the decoder's inputs of the whole conversation."""
    rows, again, other = rows_of(model, data, 4), rows_of(model, data, 4), rows_of(model, data, 4, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))
    assert [len(each) for each in rows] != [len(each) for each in other]
    every = rows_of(model, data)
    records = json.loads(data.read_text())
    assert len(every) == len(records)
    sample = next(record for record in records if "image" in record)
    messages = [
        {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
        for turn in sample["conversations"]
    ]
    batch = model.prepare([{"messages": messages, "images": [str(data.parent / sample["image"])]}], labels=True)
    with torch.no_grad():
        wanted = model.inputs_embeds(batch)
    assert any(torch.equal(each, wanted) for each in every)


def test_a_model_loaded_with_precision_is_refused(checkpoint, data, monkeypatch):
    monkeypatch.setattr(run, "check_installed", lambda: None)
    model = llava_fast.load(checkpoint, device="cpu", precision="int8")
    for quantise in (lambda: quantise_model(model, "int8"), lambda: llava_fast.calibrate(model, data)):
        with pytest.raises(QuantisationError, match="loaded with precision: load it without"):
            quantise()


def test_a_routers_rows_are_those_that_stay(data, tmp_path, monkeypatch):
    slimes.write(tmp_path)
    model, asked = llava_fast.load(tmp_path, device="cpu"), []
    routed = model.routed
    monkeypatch.setattr(model, "routed", lambda batch: asked.append(batch.plan) or routed(batch))
    rows = rows_of(model, data)
    left_out = [plan.rows - len(each) for plan, each in zip(asked, rows, strict=True)]
    assert [left > 0 for left in left_out] == [plan.tiles > 0 for plan in asked]


def test_data_that_cannot_calibrate(model, data, tmp_path, caplog):
    with pytest.raises(DataError, match=r"absent\.json"):
        rows_of(model, tmp_path / "absent.json")
    with pytest.raises(DataError, match="has 8 samples, fewer than the 9 asked for"):
        rows_of(model, data, 9)
    records = json.loads(data.read_text())
    text = [record for record in records if "image" not in record]
    (tmp_path / "text.json").write_text(json.dumps(text))
    with pytest.raises(DataError, match=f"none of the {len(text)} samples has an image"):
        rows_of(model, tmp_path / "text.json")
    for record in records[:2]:
        record["image"] = "absent.png"
    (tmp_path / "broken.json").write_text(json.dumps(records))
    broken = functools.partial(calibration_rows, model, tmp_path / "broken.json", data.parent)
    assert len(broken(None, 0, iter)) == 6
    assert "2 samples cannot calibrate" in caplog.text
    assert "absent.png" in caplog.text
    with pytest.raises(DataError, match=r"only 6 .* can calibrate, and 7 are asked for; .*absent\.png"):
        broken(7, 0, iter)


def test_requests_that_cannot_be_met(checkpoint, model, data):
    with pytest.raises(QuantisationError, match="method is 'magic': use 'gptq' or 'awq'"):
        run.calibrate(model, data, method="magic")
    with pytest.raises(QuantisationError, match="samples is 0"):
        run.calibrate(model, data, samples=0)
    with pytest.raises(QuantisationError, match="quantize is 'int3'"):
        run.calibrate(model, data, "int3")
    quantised = quantise_model(llava_fast.load(checkpoint, device="cpu"), "int4")
    with pytest.raises(QuantisationError, match="quantised already"):
        run.calibrate(quantised, data)


def test_too_few_rows_for_a_hessian(model):
    name = "layers.0.mlp.down_proj"
    with pytest.raises(QuantisationError, match="2 samples give 20 rows, fewer than the 128 inputs"):
        compress(model.decoder, {name: Rounding("int4", 32)}, [torch.zeros(10, 64)] * 2, "gptq")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--calibrate", "data.json"], "--calibrate needs --quantize"),
        (["--quantize", "int4", "--samples", "5"], "need --calibrate DATA"),
        (["--quantize", "int4", "--method", "awq"], "need --calibrate DATA"),
    ],
)
def test_options_that_do_not_go_together(options, said, tmp_path):
    result = CliRunner().invoke(app, ["convert", "model", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, QuantisationError)
    assert said in str(result.exception)


def test_nothing_is_written_on_an_interruption(checkpoint, data, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "compress", interrupted)
    monkeypatch.setattr(run, "check_installed", lambda: None)
    asked = ["convert", str(checkpoint), str(tmp_path / "out"), "--quantize", "int4", "--calibrate", str(data)]
    assert CliRunner().invoke(app, asked).exit_code != 0
    assert not list(tmp_path.iterdir())
