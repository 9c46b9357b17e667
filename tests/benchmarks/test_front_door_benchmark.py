"""`python -m benchmarks checkpoint` and benchmarks/front_door.py: a written shape is measured by the public API."""

import json

from typer.testing import CliRunner

from benchmarks import front_door
from benchmarks.__main__ import app


def test_a_written_shape_is_measured(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "1")  # main() sets them
    result = CliRunner().invoke(app, ["checkpoint", "tiny", str(tmp_path / "tiny")])
    assert result.exit_code == 0, result.output
    output = tmp_path / "out.json"
    options = ["--model", str(tmp_path / "tiny"), "--seconds", "0", "--tokens", "2", "--output-json", str(output)]
    front_door.main(options)
    rows = json.loads(output.read_text())["rows"]
    assert {row["suite"] for row in rows} == {"load", "processor", "prefill", "decode", "train-step"}
    assert all(row["median"] > 0 and row["samples"] >= 3 and row["model"] == "tiny" for row in rows)


def test_an_unknown_shape_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["checkpoint", "huge", str(tmp_path / "huge")])
    assert result.exit_code == 2
    assert "choose from tiny" in result.output.replace("\n", " ")
