"""Whole programs on a GPU that is not there: no tensor left on the CPU, no value read back (see device.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WRONG = ("mixing", "reading", "reading_inside")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has real CUDA devices")


@pytest.fixture(scope="module")
def raised() -> dict[str, str | None]:
    """What each program raised, by name; None where all went well."""
    command = [sys.executable, "-m", "tests.fake_gpu.programs"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_program_that_goes_wrong_is_found(raised):
    assert "two devices, cuda:0 and cpu" in raised["mixing"]
    assert raised["reading"].endswith("AssertionError: ['item']\n")
    assert raised["reading_inside"].rstrip().endswith(" to the host']")


def test_programs_run(raised):
    """All others in one test: each takes a fraction of a second, starting them takes ten."""
    wrong = {name: text for name, text in raised.items() if text and name not in WRONG}
    assert len(raised) > 60, "\n".join(f"{name}: {text}" for name, text in wrong.items())
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())
