"""The GPU check and the tuning command hold together: tiny sizes in the interpreter, and what they write."""

import json

import pytest
import torch

from benchmarks import gpu_check, tune
from benchmarks.op_cases import OpCase
from llava_fast.ops import triton_support


def test_a_dry_run_checks_every_op_and_writes_the_result(tmp_path):
    gpu_check.main(tmp_path / "out.json", dry_run=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["ops"] and all(row["right"] for row in result["ops"])
    assert result["ceilings"] is None and not any("ms" in row for row in result["ops"])


def test_a_wrong_result_gets_no_time_and_is_not_right():
    case = OpCase("token_pack", "", 1, 0, 1, (), lambda: torch.zeros(3), lambda: torch.ones(3), lambda: torch.ones(3))
    row = gpu_check.measure(case, torch.float32, gpu_check.machine.Ceilings(1.0, 1.0))
    assert not row["right"] and "ms" not in row


def test_tuning_takes_the_fastest_of_the_right_ones(monkeypatch):
    def run():
        return torch.full((2,), 7.0 if triton_support.config("k", torch.device("cpu"), 1)["BLOCK"] == 4 else 1.0)

    case = OpCase("token_pack", "", 1, 0, 1, ("k",), run, run, lambda: torch.ones(2))
    times = {2: 3.0, 4: 1.0, 8: 2.0}
    monkeypatch.setattr(
        tune, "milliseconds", lambda work: times[triton_support.config("k", torch.device("cpu"), 1)["BLOCK"]]
    )
    candidates = [{"BLOCK": block} for block in times]
    found = tune.timings(case, "k", candidates, limit=1e-3)
    assert found == {0: 3.0, 2: 2.0}  # 4 is faster and wrong
    monkeypatch.setitem(tune.CANDIDATES, "k", candidates)
    assert tune.best_entries({("k", 0): [found]})["k"][0]["config"] == {"BLOCK": 8}
    shared = tune.best_entries({("k", 0): [found, {0: 1.0, 1: 0.5, 2: 4.0}]})  # two ops, one kernel
    assert shared["k"][0]["config"] == {"BLOCK": 2}


def test_tables_are_written_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setitem(tune.CANDIDATES, "k", [{"BLOCK": 2}, {"BLOCK": 8}])
    entries = tune.best_entries({("k", 0): [{0: 1.0}], ("k", 16): [{0: 1.0}], ("k", 64): [{1: 1.0}]})
    assert [entry["rows"] for entry in entries["k"]] == [0, 64]  # neighbours that agree are one
    tune.write_table(entries, tmp_path / "x.json")
    monkeypatch.setattr(triton_support, "table", lambda kind: json.loads((tmp_path / "x.json").read_text()))
    found = {rows: triton_support.config("k", torch.device("cpu"), rows)["BLOCK"] for rows in (0, 1, 63, 64, 1000)}
    triton_support._entry.cache_clear()
    assert found == {0: 2, 1: 2, 63: 2, 64: 8, 1000: 8}


def test_without_a_gpu_both_say_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Exception, match="no CUDA GPU"):
        gpu_check.main(tmp_path / "out.json")
    with pytest.raises(Exception, match="needs a CUDA GPU"):
        tune.main(tmp_path)
