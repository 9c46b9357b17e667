"""`llava-fast batch` as a user runs it: exit codes, messages, kills and Ctrl-C of the process itself."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from llava_fast.cli.main import app
from llava_fast.errors import LlavaFastError
from tests.batch.conftest import read, write_csv
from tests.support import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(tiny.CASES["next"], tiny.hf_model(tiny.CASES["next"]), folder)
    return str(folder)


def command(*arguments) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "llava_fast", "batch", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def run(*arguments):
    """The command in this process; an error that `main` would print is the result's output."""
    result = CliRunner().invoke(app, ["batch", *map(str, arguments)])
    if isinstance(result.exception, LlavaFastError):
        return 1, f"error: {result.exception}"
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_exit_codes_and_what_is_said(saved, pictures, tmp_path):
    output = tmp_path / "out.jsonl"
    code, said = run(saved, pictures, output, "--prompt", "hello", "--max-tokens", "3", "--device", "cpu")
    assert code == 0, said
    assert f"{output}: 9 rows, 9 answers, 0 errors" in said
    code, said = run(saved, pictures, output, "--prompt", "hello", "--max-tokens", "3", "--device", "cpu")
    assert code == 0
    assert "9 rows are in" in said
    code, said = run(saved, pictures, output, "--prompt", "hello", "--max-tokens", "4", "--device", "cpu")
    assert code == 1
    assert "another --max-new-tokens (3 then, 4 now)" in said
    code, said = run(saved, pictures, output, "-p", "hello", "--max-tokens", "3", "--kv-cache", "int8")
    assert code == 1
    assert "another --kv-cache" in said
    (pictures / "0.png").write_bytes(b"")
    code, said = run(saved, pictures, output, "-p", "hello", "--max-tokens", "3", "--overwrite", "--device", "cpu")
    assert code == 3
    assert "9 rows, 8 answers, 1 errors" in said
    assert "the first error, of '0.png': " in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "{colour}"], "names the column 'colour'"),
        ([], "there is no prompt"),
        (["-p", "a", "--schema", "missing.json"], "--schema missing.json cannot be read"),
        (["-p", "a", "--image-column", "x"], "has no columns"),
        (["-p", "a", "--top-p", "2"], "top_p must be"),
    ],
)
def test_wrong_options_are_one_line(saved, pictures, tmp_path, options, message):
    code, said = run(saved, pictures, tmp_path / "out.jsonl", *options)
    assert code == 1
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_that_is_not_there(pictures, tmp_path):
    code, said = run(tmp_path / "missing", pictures, tmp_path / "out.jsonl", "-p", "a")
    assert code == 1
    assert "missing" in said
    assert "\n" not in said
    assert not (tmp_path / "out.jsonl").exists()


def test_a_schema_and_a_column(saved, pictures, tmp_path):
    """Every answer is whole: even a random model cannot spend its tokens on spaces."""
    pytest.importorskip("llguidance")
    properties = {"seen": {"enum": ["yes", "no"]}, "how many": {"enum": [1, 22, 333]}}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    rows = [{"id": n, "image": "pictures/0.png", "prompt": f"hello {n}"} for n in range(6)]
    table = write_csv(tmp_path / "rows.csv", rows)
    code, said = run(saved, table, tmp_path / "out.jsonl", "--schema", tmp_path / "schema.json", "--device", "cpu")
    assert code == 0, said
    for row in read(tmp_path / "out.jsonl"):
        assert row["answer"]["seen"] in ("yes", "no")
        assert row["answer"]["how many"] in (1, 22, 333)


def test_kills_and_ctrl_c_of_the_process(saved, pictures, tmp_path):
    """Each at a moment that nobody chose; between them the file only grows."""
    rows = [{"id": n, "image": f"pictures/{(0, 2, 3, 4)[n % 4]}.png", "prompt": f"hello {n}"} for n in range(400)]
    arguments = [write_csv(tmp_path / "rows.csv", rows), tmp_path / "out.jsonl", "--max-tokens", "5"]
    arguments += ["--device", "cpu", "--batch-invariant", "--temperature", "1"]
    rng, done = random.Random(1), b""
    for sent in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT):
        process = command(saved, *arguments)
        while process.poll() is None and _size(arguments[1]) <= len(done):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(sent)
        _, said = process.communicate(timeout=120)
        now = arguments[1].read_bytes()
        assert now.startswith(done)
        done = now[: now.rfind(b"\n") + 1]
        if sent == signal.SIGINT:
            assert process.returncode == 130, said
            assert "stopped: give the same command, without --overwrite, to go on" in said
        else:
            assert process.returncode == -signal.SIGKILL, said
    assert done.count(b"\n") < 400
    process = command(saved, *arguments)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert [row["id"] for row in read(arguments[1])] == [str(n) for n in range(400)]
    arguments[1] = tmp_path / "whole.jsonl"
    assert run(saved, *arguments)[0] == 0
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert json.loads((tmp_path / "out.jsonl.run.json").read_text())["about"]["--temperature"] == 1


def _size(path) -> int:
    return path.stat().st_size if path.exists() else 0
