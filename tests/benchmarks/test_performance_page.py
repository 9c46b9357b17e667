"""docs/performance.md is what its command makes of the committed results, and what it would make of a GPU's."""

import json

import pytest

from benchmarks import performance_page
from benchmarks.machine import ROOT
from benchmarks.performance_page import targets


def test_the_page_is_up_to_date(monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(ROOT / "benchmarks" / "results")
    monkeypatch.setattr(performance_page, "ROOT", tmp_path)
    performance_page.main()
    assert (tmp_path / "docs" / "performance.md").read_text() == (ROOT / "docs" / "performance.md").read_text()


def op(case: str, tiles: int, **more) -> dict:
    common = {"case": case, "op": case, "label": f"{tiles} tiles", "tiles": tiles, "dtype": "bfloat16", "right": True}
    return {**common, "backend": "triton", **more}


def side(backend: str, median: float, peak: int, passed: bool | None = None) -> dict:
    check = None if passed is None else {"passed": passed}
    row = {"backend": backend, "median": median, "peak_memory_bytes": peak, "check": check}
    return {**row, "case": "1 image", "settings": {"dtype": "bfloat16"}}


@pytest.fixture
def result() -> dict:
    """Made-up times that reach every target of an H200."""
    return {
        "machine": {"kind": "NVIDIA H200"},
        "commit": "abc",
        "versions": {"torch": "1", "triton": "2", "transformers": "3", "cuda": "4"},
        "tests": {"tests": 9, "failures": 0, "errors": 0, "skipped": 1, "crashed": []},
        "ops": [
            op("image_tiles_from_host", 5, ms=1.0, plain_ms=5.5),
            *(op("assemble_inputs", tiles, ms=1.2, bare_ms=1.0, plain_ms=3.0) for tiles in (1, 5, 40)),
            op("token_pack", 40, ms=1.0, copy_ms=0.8),
            op("token_pack_native", 40, ms=0.9, copy_ms=0.8),
            op("layer_norm", 40, ms=1.0, copy_ms=0.9),
            op("patch_embed", 5, ms=1.0, plain_ms=1.5),
        ],
        "path": {
            "path": [side("llava_fast", 0.010, 40, True), side("hf-eager", 0.021, 100)],
            "path-compiled": [side("llava_fast", 0.010, 40, True), side("hf-compile", 0.012, 90)],
        },
    }


def verdicts(result: dict) -> list[str]:
    return [verdict for _, _, verdict in targets(result)]


def test_targets_that_are_reached(result):
    assert verdicts(result) == ["reached"] * 8
    said = {asked: found for asked, found, _ in targets(result)}
    assert said["token_pack, 40 tiles: at least 0.85 of a copy's speed"] == "40 tiles, CUDA: 0.89"
    assert any("torch's antialiased bicubic (no torchvision)" in asked for asked in said)


def test_the_torchvision_processor_is_what_counts_where_it_was_measured(result):
    result["ops"][0]["bare_ms"] = 4.0
    asked, found, verdict = targets(result)[0]
    assert "torchvision processor" in asked
    assert found == "5 tiles: 4.00"
    assert verdict == "MISSED"


def test_an_a100_is_asked_for_more(result):
    result["machine"]["kind"] = "NVIDIA A100-SXM4-80GB"
    assert verdicts(result)[3] == "MISSED"


@pytest.mark.parametrize("what", [{"right": False, "error": 0.5}, {"right": False, "exception": "OutOfMemoryError: x"}])
def test_one_size_that_is_wrong_or_raises_misses_its_target(result, what):
    row = op("assemble_inputs", 40) | what
    result["ops"][3] = row
    _asked, found, verdict = targets(result)[3]
    assert verdict == "MISSED"
    assert "40 tiles: wrong or failed" in found


def test_a_path_that_is_slow_heavy_or_wrong_misses(result):
    result["path"]["path"] = [side("llava_fast", 0.015, 60, True), side("hf-eager", 0.021, 100)]
    assert [verdicts(result)[place] for place in (1, 7)] == ["MISSED", "MISSED"]
    result["path"]["path"] = [side("llava_fast", 0.001, 1, False), side("hf-eager", 0.021, 100)]
    assert [verdicts(result)[place] for place in (1, 7)] == ["MISSED", "MISSED"]


def test_what_was_not_measured_is_said(result):
    assert verdicts({"machine": {"kind": "NVIDIA H200"}, "ops": []}) == ["not measured"] * 8


def test_the_page_holds_a_result_with_rows_that_failed(result, tmp_path):
    result["ops"].append(op("rope", 5, right=False, exception="RuntimeError: a | b"))
    result["steps"] = {"build": "ok, 9 s", "sanitizer": "refused by this machine: no"}
    result["tests"]["crashed"] = ["tests/ops/test_rope.py (exit status 139)"]
    path = tmp_path / "2030-01-01-h200-gpu.json"
    path.write_text(json.dumps(result))
    text = "\n".join(performance_page.measured([path]))
    assert "| rope | 5 tiles | triton | bfloat16 |  |  |  |  |  |  | RuntimeError: a / b |" in text
    assert "Steps of the check: build ok, 9 s; sanitizer refused by this machine: no." in text
    assert "Crashed or cut off: tests/ops/test_rope.py (exit status 139)." in text
    assert "| Triton | llava_fast | 10.000 | 0 | yes |" in text
    assert "|  | hf-compile | 12.000 | 0 |  |" in text
    del result["path"], result["tests"]
    path.write_text(json.dumps(result))
    assert "The kernels' tests were not run there." in "\n".join(performance_page.measured([path]))
