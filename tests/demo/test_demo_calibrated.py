"""The demo model calibrated in 4 bits: nearer to its float32 logits than rounded to nearest, on held-out scans."""

import importlib.util
import json
from pathlib import Path

import calibrated
import pytest

import llava_fast
from llava_fast.demo.run import model_path

without = importlib.util.find_spec("llmcompressor") is None


def test_the_committed_result():
    report = json.loads(Path(calibrated.__file__).with_name("calibrated.json").read_text())
    error = {name: found["logits_error"] for name, found in report["results"].items()}
    assert report["canvases"] == 1000
    for group in (32, 128):
        assert error[f"group {group}, gptq"] < 0.5 * error[f"group {group}, nearest"]
    assert error["group 32, awq"] < error["group 32, nearest"]


@pytest.mark.skipif(without, reason="needs llm-compressor: make test-calibrate")
def test_calibrated_logits_are_nearer(tmp_path):
    data = calibrated.write_data(tmp_path / "calibration", 24, held_out=False)
    held_out = calibrated.write_data(tmp_path / "held_out", 8, held_out=True)
    exact = calibrated.logits(llava_fast.load(model_path(), device="cpu"), held_out)

    def error(name):
        found = calibrated.logits(calibrated.quantise(calibrated.FORMS[f"group 32, {name}"], data, 24), held_out)
        return float((found - exact).norm() / exact.norm())

    nearest = error("nearest")
    assert error("gptq") < 0.6 * nearest
    assert error("awq") < nearest
