"""The GPU check and the tuning command hold together: tiny sizes in the interpreter, and what they write."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import typer

from benchmarks import gpu_check, machine, tune
from benchmarks.op_cases import MAKERS, MEASURED_BESIDE, OpCase, made
from llava_fast.ops import triton_support
from llava_fast.ops.selection import store
from llava_fast.ops.selection.verdict import Verdict

ONES = torch.ones(2)
SCRIPT = machine.ROOT / "benchmarks" / "gpu_check.sh"


def test_a_dry_run_checks_every_op_and_writes_the_result(tmp_path):
    gpu_check.measure_ops(tmp_path / "out.json", dry_run=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["ops"]) == len(MAKERS) + len(MEASURED_BESIDE)
    assert all(row["right"] for row in result["ops"])
    assert result["ceilings"] is None
    assert not any("ms" in row for row in result["ops"])


def values(work) -> Callable[..., OpCase]:
    def make(*_) -> OpCase:
        return OpCase("an_op", "", 1, 0, 8, (), work, lambda: torch.ones(3), lambda: torch.ones(3), backend="auto")

    return make


def broken():
    raise RuntimeError("an illegal\n  memory access")


def test_an_op_that_raises_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    def cannot_be_made(*_):
        raise MemoryError("too large")

    output = tmp_path / "out.json"
    fine = values(lambda: torch.ones(3))
    monkeypatch.setattr(gpu_check, "MAKERS", (cannot_be_made, values(broken), fine))
    monkeypatch.setattr(gpu_check, "MEASURED_BESIDE", ())
    for number, make in enumerate(gpu_check.MAKERS):
        make.__name__ = f"case{number}"
    with pytest.raises(typer.Exit):
        gpu_check.measure_ops(output, dry_run=True)
    rows = json.loads(output.read_text())["ops"]
    assert [row.get("exception") for row in rows] == [
        "MemoryError: too large",
        "RuntimeError: an illegal memory access",
        None,
    ]
    assert [row["right"] for row in rows] == [False, False, True]
    assert all("backend" in row for row in rows)

    later = values(broken)  # a run that goes on in a fresh process keeps the rows that are there
    later.__name__ = "case3"
    monkeypatch.setattr(gpu_check, "MAKERS", (*gpu_check.MAKERS[:2], values(broken), later))
    gpu_check.MAKERS[2].__name__ = "case2"
    with pytest.raises(typer.Exit):
        gpu_check.measure_ops(output, dry_run=True)
    again = json.loads(output.read_text())["ops"]
    assert again[:3] == rows
    assert again[3]["case"] == "case3"
    assert len(again) == 4


def test_after_a_fault_of_the_gpu_a_fresh_process_goes_on(tmp_path, monkeypatch):
    class Replaced(Exception):
        pass

    def execv(path: str, arguments: list[str]):
        raise Replaced(arguments)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "compile_in_parallel", lambda shipped: None)
    monkeypatch.setattr(gpu_check, "context_is_lost", lambda: True)
    monkeypatch.setattr(machine, "measure_ceilings", lambda *_: machine.Ceilings(1.0, 1.0))
    monkeypatch.setattr(gpu_check, "MAKERS", (values(broken), values(broken)))
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "measure", "--output", "x"])
    with pytest.raises(Replaced, match=r"'benchmarks.gpu_check', 'measure', '--output', 'x'"):
        gpu_check.measure_ops(tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["ops"]
    assert len(rows) == 1
    assert "illegal" in rows[0]["exception"]


def test_work_that_waits_for_the_gpu_is_known_before_a_graph_takes_it(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waiting():
        raise RuntimeError("called a synchronizing CUDA operation")

    assert tune.waits(waiting)
    assert not tune.waits(lambda: None)
    with pytest.raises(RuntimeError, match="illegal"):
        tune.waits(broken)
    assert modes == ["error", "default"] * 3


def test_a_ceiling_of_a_gpu_is_the_best_time_of_one_of_several_calls(monkeypatch):
    class Event:
        times: ClassVar = [50.0, 20.0]  # milliseconds of all calls between two events

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def elapsed_time(self, end) -> float:
            return self.times.pop() if len(self.times) > 1 else self.times[0]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert machine._best_on_gpu(lambda: None, seconds=0.05, calls=10) == pytest.approx(0.002)


def test_a_time_that_cannot_be_taken_leaves_the_others(monkeypatch):
    def timed(work) -> float:
        work()
        return 2.0

    monkeypatch.setattr(gpu_check, "milliseconds", timed)
    monkeypatch.setattr(gpu_check, "waits", lambda work: False)
    monkeypatch.setattr(gpu_check, "copy_of", lambda moved: lambda: None)
    case = dataclasses.replace(values(lambda: torch.ones(3))(), bare=broken)
    row = gpu_check.measure(case, torch.float32, gpu_check.machine.Ceilings(1.0, 1.0))
    assert row["exception"] == "bare_ms: RuntimeError: an illegal memory access"
    assert row["ms"] == row["plain_ms"] == row["copy_ms"] == row["reference_ms"] == 2.0
    assert not row["faster"]


def test_a_wrong_result_gets_no_time_and_is_not_right():
    case = OpCase("token_pack", "", 1, 0, 1, (), lambda: torch.zeros(3), lambda: torch.ones(3), lambda: torch.ones(3))
    row = gpu_check.measure(case, torch.float32, gpu_check.machine.Ceilings(1.0, 1.0))
    assert not row["right"]
    assert "ms" not in row


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


def test_a_kernel_without_a_right_candidate_does_not_end_the_tuning(tmp_path, monkeypatch):
    def case(kernel: str, value: float) -> Callable[..., OpCase]:
        def make(*_) -> OpCase:
            return OpCase("an_op", "x", 64, 0, 8, (kernel,), lambda: torch.full((2,), value), broken, lambda: ONES)

        return make

    def cannot_be_made(*_):
        raise MemoryError("too large")

    for name in ("wrong", "right"):
        monkeypatch.setitem(tune.CANDIDATES, name, [{"BLOCK": 2}])
    monkeypatch.setattr(tune, "milliseconds", lambda work: 1.0)
    monkeypatch.setattr(tune, "MAKERS", (cannot_be_made, case("wrong", 7.0), case("right", 1.0)))
    monkeypatch.setattr(tune, "TILES", (5,))
    failed = tune.tune(torch.float32, 1e-3, tmp_path / "x.json", device="cpu")
    assert failed == [
        "cannot_be_made, 5 tiles: MemoryError: too large",
        "wrong: no candidate gives the right answer for an_op, x",
    ]
    assert list(json.loads((tmp_path / "x.json").read_text())) == ["right"]


def test_tuned_tables_stand_in_front_of_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(triton_support, "table", triton_support.table)  # put back when the test ends
    shipped = triton_support.table("default")
    with pytest.raises(typer.BadParameter, match=r"run benchmarks.tune first"):
        gpu_check.use_tables(tmp_path)
    kind = triton_support.device_kind(torch.device("cuda")) if torch.cuda.is_available() else "default"
    (tmp_path / f"{kind if kind != 'default' else 'other'}.json").write_text(
        '{"rope_kernel": [{"rows": 0, "config": {"HEADS": 3}}]}'
    )
    gpu_check.use_tables(tmp_path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = triton_support.OPTIONS
    assert triton_support.config("rope_kernel", device, 5) == options | {"HEADS": 3}
    assert triton_support.config("swiglu_kernel", device, 5) == options | shipped["swiglu_kernel"][0]["config"]
    triton_support._entry.cache_clear()


def test_every_tuned_kernel_is_one_that_some_case_names():
    named = {name for make in MAKERS for name in made(make, 1, torch.float32, "meta", gpu_check.TINY).kernels}
    assert named == set(tune.CANDIDATES)


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
        gpu_check.measure_ops(tmp_path / "out.json")
    with pytest.raises(Exception, match="needs a CUDA GPU"):
        tune.main(tmp_path)


SUITES = ("answer", "decode", "answer-compiled", "decode-compiled", "train-step")
PYTHON = """#!/usr/bin/env bash
# Stands in for python3: does what each step of the script would leave behind, without a GPU.
all="$*"
echo "$all" >>"$CALLS"
case "$all" in
  *"-m pytest"*test_rope.py) kill -SEGV $$ ;;
  *"-m pytest"*"-k native"*) ;;
  *"-m pytest"*)
    xml=${all#*--junitxml=}
    echo '<testsuites><testsuite tests="3" failures="0" errors="0" skipped="1"/></testsuites>' >"${xml%% *}" ;;
  *"benchmarks.run"*) echo '{"rows": ["'"$LLAVA_FAST_BACKEND"'"]}' >"${*: -1}" ;;
  *"gpu_check select"*) 
    mkdir -p "$LLAVA_FAST_CACHE/selection" && echo '{"verdicts": {}}' >"$LLAVA_FAST_CACHE/selection/a-gpu.json" ;;
  *"gpu_check launches"*) echo '{"greedy": 1}' >"${*: -1}" ;;
  *"gpu_check measure"*)
    out=${all#*--output }
    out=${out%% *}
    row='"case": "rope", "tiles": 5, "dtype": "bfloat16"'
    echo '{"ceilings": null, "ops": [{'"$row"', "from": "'"$(basename "$out")"'"}]}' >"$out" ;;
  *"benchmarks.tune"*) sleep "${TUNE_SECONDS:-0}" ;;
  *"gpu_check collect"*) [[ -n ${COLLECT:-} ]] && exec "$REAL_PYTHON" "$@" ;;
  *"build_ext"*) ((LLAVA_FAST_CUDA == 0)) ;;
  *"-c "*) false ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Runs gpu_check.sh with stand-ins for python3, nvidia-smi and compute-sanitizer on PATH; (status, steps, text)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    sanitizer = "#!/bin/sh\necho '========= Error: the device is not supported'; exit 1\n"
    for name, text in {"python3": PYTHON, "nvidia-smi": "#!/bin/sh\n", "compute-sanitizer": sanitizer}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def run(*arguments: str, out: Path = tmp_path / "out", **more: str) -> tuple[int, dict[str, str], str]:
        paths = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
        environment = {**os.environ, **paths, "REAL_PYTHON": sys.executable, **more}
        done = subprocess.run(
            ["bash", SCRIPT, str(out), *arguments], env=environment, capture_output=True, text=True, check=False
        )
        steps = (out / "steps").read_text().splitlines() if (out / "steps").is_file() else []
        return done.returncode, dict(line.split(": ", 1) for line in steps), done.stdout + done.stderr

    return run


def test_the_script_does_its_steps_and_joins_what_they_found(script, tmp_path):
    status, steps, text = script(COLLECT="1", LLAVA_FAST_COMMIT="abc")
    assert list(steps) == [
        *("build", "build-without-cuda", "select", "launches", "answer", "decode", "answer-compiled"),
        *("decode-compiled", "path", "path-compiled", "measure", "tests", "train-step", "path-graphs"),
        *("path-reference", "tune", "measure-tuned", "sanitizer"),
    ]
    assert steps["build"].startswith("failed with exit status 1")
    assert steps["build-without-cuda"].startswith("ok")
    assert steps["tests"].startswith("failed")  # one file crashed
    assert steps["sanitizer"] == "refused by this machine: ========= Error: the device is not supported"
    others = set(steps) - {"build", "tests", "sanitizer"}
    assert all(steps[name].startswith("ok") for name in others), text
    assert status == 1, text
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    on_triton = {name: ["triton"] for name in ("path", "path-compiled", "path-graphs")}
    assert result["suites"] == {name: [""] for name in SUITES}  # on the backend that selection chooses
    assert result["launches"] == {"greedy": 1}
    assert result["verdicts"] == {"a-gpu": {"verdicts": {}}}
    assert result["path"] == on_triton | {"path-reference": ["reference"]}
    assert [row["from"] for row in result["ops"]] == ["ops-tuned.json"]
    assert result["steps"] == steps
    files = len(list((machine.ROOT / "tests" / "ops").glob("test_*.py"))) + 4
    assert result["tests"]["tests"] == 3 * (files - 1)
    assert result["tests"]["skipped"] == files - 1
    assert result["tests"]["crashed"] == ["tests/ops/test_rope.py (exit status 139)"]
    assert len(list((tmp_path / "out").glob("logs-*.tar.gz"))) == 1
    assert not list((tmp_path / "out").glob("*.log"))


def test_two_names_stand_for_the_steps_of_two_calls(script, tmp_path):
    first = script("first")[1]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "gpu.json").write_text("{}")
    (tmp_path / "calls").write_text("")
    second = script("second", out=tmp_path / "again")[1]
    assert (tmp_path / "calls").read_text().startswith(f"-m benchmarks.gpu_check restore {tmp_path / 'again'}\n")
    assert list(first) == ["build", "build-without-cuda", "select", "launches", *SUITES[:4]]
    assert list(second) == ["build", "build-without-cuda", "tests", "train-step", "sanitizer"]


def test_verdicts_of_an_earlier_call_are_used_by_the_next(tmp_path, monkeypatch):
    """Also in another folder, which has that call's gpu.json alone."""
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    monkeypatch.setenv("LLAVA_FAST_CACHE", str(first / "verdicts"))  # as gpu_check.sh does
    gpu = {"device": "A GPU", "multiprocessors": "1"}
    verdict = Verdict(backend="triton", configs={"rope_kernel": {"HEADS": 3}}, by="tune")
    with store.locked(gpu, 1.0):
        store.keep(gpu, {"rope x": verdict})
    gpu_check.collect(first)
    second.mkdir()
    (second / "gpu.json").write_text((first / "gpu.json").read_text())
    gpu_check.restore(second)
    monkeypatch.setenv("LLAVA_FAST_CACHE", str(second / "verdicts"))
    assert store.cached(gpu).verdicts == {"rope x": verdict}
    store.path_of(gpu).write_text("newer")
    gpu_check.restore(second)
    assert store.path_of(gpu).read_text() == "newer"
    monkeypatch.setattr(machine, "commit", lambda: "another")
    store.path_of(gpu).unlink()
    gpu_check.restore(second)
    assert not store.path_of(gpu).exists()


def test_launches_are_counted_and_verdicts_found(tmp_path, monkeypatch):
    """What a GPU would do, on the tiny shape on a CPU, where nothing is launched."""
    gpu_check.launches(tmp_path / "launches.json", "tiny", "cpu")
    found = json.loads((tmp_path / "launches.json").read_text())
    for way in ("greedy", "drawn"):
        assert found[way]["prompt"]["kernels"] == found[way]["token"]["graphs"] == 0
        assert found[way]["prompt"]["ms"] > 0 < found[way]["token"]["ms"]
        assert found[way]["without_graphs"] == {"encode": None, "decode": None}
    proven = []
    monkeypatch.setattr(gpu_check, "prove", lambda *given: proven.append(given))
    gpu_check.select("tiny", "cpu", True, 3.0)
    ((model, training, budget),) = proven
    assert all(each.requires_grad for each in model.parameters())
    assert (training, budget) == (True, 3.0)


def test_a_step_that_hangs_starves_no_later_one(script, tmp_path):
    status, steps, _ = script("tune", "measure-tuned", BUDGET="20", TUNE_SECONDS="60")
    assert status == 1
    assert steps["tune"].startswith("cut off after")
    assert steps["measure-tuned"].startswith("ok")
    calls = (tmp_path / "calls").read_text()
    assert "-m pytest" not in calls
    assert "benchmarks.run" not in calls


def test_the_script_explains_itself_and_refuses_an_unknown_step(script):
    assert "OUT_DIR [STEP...]" in script("--help", out=Path("--help"))[2]
    status, _, text = script("tsts")
    assert status == 2
    assert "no step is called 'tsts'" in text
    assert "path-compiled" in text


def test_results_of_calls_are_added_unless_the_commit_differs(tmp_path, monkeypatch):
    def called(commit: str, name: str) -> dict:
        monkeypatch.setattr(machine, "commit", lambda: commit)
        for old in tmp_path.glob("path*.json"):
            old.unlink()
        (tmp_path / f"{name}.json").write_text('{"rows": []}')
        gpu_check.collect(tmp_path)
        return json.loads((tmp_path / "gpu.json").read_text())

    assert list(called("one", "path")["path"]) == ["path"]
    assert list(called("one", "path-compiled")["path"]) == ["path", "path-compiled"]
    assert list(called("two", "path-reference")["path"]) == ["path-reference"]
    assert (tmp_path / "gpu-one.json").is_file()


def test_the_commit_outside_a_checkout_is_the_variables(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("LLAVA_FAST_COMMIT", "abc")
    assert machine.commit() == "abc"
    monkeypatch.delenv("LLAVA_FAST_COMMIT")
    assert machine.commit() == "unknown"


def test_a_shape_needs_no_torchvision():
    """transformers 5.17 has no AutoImageProcessor without torchvision, and the GPU machine may lack it."""
    code = """
import sys
sys.modules["torchvision"] = None
import torch, transformers
def refused(*_, **__): raise ImportError("AutoImageProcessor requires torchvision")
transformers.AutoImageProcessor.from_pretrained = transformers.AutoProcessor.from_pretrained = refused
from benchmarks.subject import Subject
print(type(Subject("tiny", None, torch.float32, "cpu").hf_processor.image_processor).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "LlavaNextImageProcessorPil", done.stderr[-2000:]
