"""The command line: every command answers --help, good input works, bad input is one line and exit code 1."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from llava_fast.cli.main import app
from tests.support import tiny


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llava_fast", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(tiny.CASES["next"], tiny.hf_model(tiny.CASES["next"]), folder)
    return str(folder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("images") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.mark.parametrize(
    "command",
    ["generate", "chat", "batch", "serve", "eval", "judge", "convert", "merge-lora", "tune", "doctor", "demo"],
)
def test_help(command):
    result = run(command, "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout


def test_help_shows_what_is_in_brackets():
    """A "[word]" is markup to typer's help and vanishes, unless a backslash is before it."""
    reached, lost = [(get_command(app), [])], []
    for command, path in reached:
        reached += [(part, [*path, name]) for name, part in getattr(command, "commands", {}).items()]
        shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).stdout
        shown = " ".join(shown.replace("│", " ").split())
        written = [command.help or "", *(getattr(option, "help", None) or "" for option in command.params)]
        bracketed = [" ".join(words.split()) for words in re.findall(r"\[[^\[\]]*\]", "\n".join(written))]
        lost += [(path, words) for words in bracketed if words not in shown]
    assert len(reached) > 30
    assert not lost


def test_doctor_tells_of_a_model(model, tmp_path):
    result = run("doctor", "--model", model)
    assert result.returncode == 0, result.stderr
    assert "replaced: " in result.stdout, result.stderr
    result = run("doctor", "--model", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "cannot build" in result.stderr


def test_generate_prints_one_json_object(model, picture):
    result = run("generate", model, "-i", picture, "-p", "hello", "--json", "--max-new-tokens", "5")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert len(answer["token_ids"]) <= 5
    assert answer["usage"]["visual_tokens"] > 49


def test_generate_ranks_candidates(model, picture):
    result = run("generate", model, "-i", picture, "-p", "hello", "--candidate", "a cat", "--candidate", "a dog")
    assert result.returncode == 0, result.stderr
    sums = [float(line.split()[0]) for line in result.stdout.splitlines()]
    assert len(sums) == 2
    assert sums == sorted(sums, reverse=True)
    assert {line.split(maxsplit=2)[2] for line in result.stdout.splitlines()} == {"a cat", "a dog"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-i", "missing.png"], "no image or video file 'missing.png'"),
        (["--top-p", "2"], "top_p must be above 0"),
        (["--chat-template", "nonsense"], "unknown chat template 'nonsense'"),
        (["--dtype", "int8"], "dtype 'int8'"),
        (["--device", "gpu"], "device 'gpu' is unknown"),
        (["--candidate", "a", "--seed", "3"], "nothing is generated"),
    ],
)
def test_bad_input_is_one_line(model, arguments, says):
    result = run("generate", model, "-p", "hello", *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_demo_that_cannot_be_written_is_one_line(tmp_path):
    pytest.importorskip("sklearn")
    result = run("demo", "--no-compare", "--output", tmp_path / "canvas.odd")
    assert result.returncode == 1
    assert result.stderr.startswith("error: --output ")
    assert "unknown file extension: .odd" in result.stderr


def test_chat_answers_each_line_and_survives_a_bad_one(model, picture):
    lines = f"what is in @{picture}\nand now @no/such.png\n/reset\n/quit\n"
    result = run("chat", model, "--max-new-tokens", "3", text=lines)
    assert result.returncode == 0
    assert "no/such.png" in result.stderr
    assert "Traceback" not in result.stderr


def test_convert_there_and_back(model, tmp_path):
    assert run("convert", model, tmp_path / "original", "--layout", "original").returncode == 0
    again = run("convert", model, tmp_path / "original")
    assert again.returncode == 1
    assert "is not empty" in again.stderr
