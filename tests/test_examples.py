"""The example scripts that need no checkpoint from the user run unchanged."""

import importlib.util
import re
from pathlib import Path

import pytest
import typer
from transformers import AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner

import llava_fast

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments) -> str:
    """What examples/<name>.py prints."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False).stdout


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+), \d+ ms", printed)]


@pytest.mark.parametrize("lora", [[], ["--lora"]])
def test_finetune_hf_trainer(lora, tmp_path):
    pytest.importorskip("sklearn")
    options = ["--steps", 5, "--batch-size", 2, *lora]
    ours = run("finetune_hf_trainer", tmp_path / "ours", *options)
    stock = run("finetune_hf_trainer", tmp_path / "stock", *options, "--no-accelerate")
    assert len(losses(ours)) == 5
    assert losses(ours) == pytest.approx(losses(stock), abs=2e-4)  # four decimals are printed
    assert "ms, accelerated" in ours
    assert "ms, stock" in stock
    weights = [AutoModelForImageTextToText.from_pretrained(tmp_path / side).state_dict() for side in ("ours", "stock")]
    assert weights[0].keys() == weights[1].keys()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "ours")) > 0
    answer = llava_fast.load(tmp_path / "ours").generate([{"prompt": "USER: hello"}], max_new_tokens=2)
    assert answer[0].token_ids
