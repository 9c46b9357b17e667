"""`llava-fast eval`: the demo from start to report, its options, its listing, its errors."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from llava_fast.cli.evaluate import _shard
from llava_fast.cli.main import app
from llava_fast.demo.run import model_path
from llava_fast.errors import EvaluationError
from llava_fast.evaluate.results import failures_of, load_results, results_before
from llava_fast.evaluate.run import Plan, run
from llava_fast.evaluate.task import Answer
from llava_fast.evaluate.tasks import TASKS
from tests.support import published


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_demo_from_start_to_report(tmp_path):
    result = invoke("demo", "demo:5", "--out", tmp_path / "a", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "digits right" in result.stdout
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    demo = results["tasks"]["demo:5"]
    assert (demo["questions"], demo["errors"]) == (20, 0)
    assert demo["metrics"]["accuracy"] >= 75  # the card says 91.6 to 99.4 by kind
    assert (tmp_path / "a" / "report" / "index.html").exists()
    assert len(list((tmp_path / "a" / "report" / "pictures").iterdir())) == 5
    again = invoke("demo", "demo:5", "--out", tmp_path / "b", "--device", "cpu", "--no-report", "--batch", 3)
    assert again.exit_code == 0, again.exception
    assert not (tmp_path / "b" / "report").exists()
    compared = invoke("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert compared.exit_code == 0, compared.exception
    assert [each["low"] for each in json.loads(compared.stdout)] == [0, 0]
    table = invoke("compare", tmp_path / "a", tmp_path / "b")
    assert "95% interval" in table.stdout


def test_failures_and_another_model_are_said(tmp_path):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "4"}]
    (tmp_path / "q.json").write_text(json.dumps([{"id": "a", "image": "text.jpg", "conversations": turns}]))
    (tmp_path / "text.jpg").write_text("no picture")
    asked = ["demo", "llava:q.json", "--data", tmp_path, "--out", tmp_path / "o", "--device", "cpu", "--no-report"]
    result = invoke(*asked)
    assert result.exit_code == 0, result.output
    assert "llava:q.json: 1 of 1 questions got no answer and count as wrong; the first, '0-0': " in result.stderr
    assert "text.jpg' is not an image" in result.stderr
    results = load_results(tmp_path / "o")
    (row,) = results["tasks"]["llava:q.json"]["answers"]
    row["score"] = None  # as of a task that is judged
    assert "1 of 1 questions got no answer and are left out; " in failures_of(results, ["llava:q.json"])[0]
    assert results_before(tmp_path / "o", {**results["model"], "an option since": None})
    assert "without --shard asks again what failed" in invoke(*asked, "--shard", "0/1").stderr
    other = invoke(*asked, "--quantize", "int4")
    assert "(quantize is None there and 'int4' now): give another --out" in str(other.exception)


def test_tasks_are_listed_with_their_files():
    result = invoke("--tasks")
    assert result.exit_code == 0
    for name in TASKS:
        task = TASKS[name]
        assert f"{name}: {task.title}" in result.stdout
        assert all(file.path in result.stdout for file in task.files)
        assert task.scorer in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "imagenet"], "unknown task 'imagenet'"),
        (["demo", "demo:1", "--choose", "likelihood"], "demo:1 has no options"),
        (["demo", "seed", "--choose", "likelihood", "--max-new-tokens", "3"], "leave it out with --choose"),
        (["demo", "lmms:mme", "--choose", "likelihood"], "leave --choose out"),
        (["demo", "pope"], "pope needs"),
        (["demo", "demo:1", "--shard", "4/4"], "--shard is '4/4'"),
        (["demo", "demo:1", "--ray", "2", "--processes", "2"], "exclude each other"),
        (["demo", "lmms:mme"], "lmms-eval"),
        (["compare", "none", "none"], "cannot be read"),
    ],
)
def test_bad_input_is_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)


def test_an_undefined_difference_is_not_starred(tmp_path):
    """Never "yes": POPE's precision is undefined in both evaluations, and so are its differences."""
    published.pope(tmp_path)
    for name in ("a", "b"):
        plan = Plan(("pope",), tmp_path, tmp_path / name, {"path": name})
        run(plan, lambda questions, options: ((question, Answer("no")) for question in questions))
    table = invoke("compare", tmp_path / "a", tmp_path / "b", "--resamples", 100).stdout
    (line,) = (line for line in table.splitlines() if "precision" in line)
    assert line.count("undefined") == 5
    assert "*" not in line
    rows = invoke("compare", tmp_path / "a", tmp_path / "b", "--resamples", 100, "--json").stdout
    (row,) = (row for row in json.loads(rows, parse_constant=pytest.fail) if row["metric"] == "precision")
    assert [row[key] for key in ("a", "b", "low", "high", "better")] == [None] * 5


def test_out_that_is_a_file_is_said_first(tmp_path):
    (tmp_path / "out").touch()
    assert invoke("demo", "demo:1", "--out", tmp_path / "out").exit_code == 2
    asked = []
    published.pope(tmp_path)
    with pytest.raises(EvaluationError, match="out/below cannot be made a folder"):
        run(Plan(("pope",), tmp_path, tmp_path / "out" / "below", {}), lambda *_: asked.append(1) or ())
    assert not asked


def test_a_shard_is_torchruns_unless_it_is_given(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert _shard(None) is None
    assert _shard("1/4") == (1, 4)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert _shard(None) == (2, 3)
    assert _shard("0/1") == (0, 1)
    with pytest.raises(EvaluationError, match="write the number from 0"):
        _shard("1")


def test_it_starts_without_torch(tmp_path):
    """Listing, comparing and what is wrong with the data do not wait for torch."""
    code = (
        "import sys; from llava_fast.cli import evaluate, main; import llava_fast.evaluate.run, "
        "llava_fast.evaluate.compare, llava_fast.evaluate.report; from llava_fast.evaluate.tasks import TASKS; "
        "[TASKS[name] for name in TASKS]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_lmms_evals_tasks(tmp_path, monkeypatch):
    """A stand-in for lmms-eval's evaluator: what it is given, and its results beside our own."""
    from types import ModuleType

    given = {}

    def simple_evaluate(**options):
        given.update(options)
        sample = {"doc_id": 3, "target": "yes", "filtered_resps": ["no"], "input": "Is it?", "exact_match": 0.0}
        unscored = {"doc_id": 4, "target": float("nan"), "exact_match": float("nan")}
        return {
            "results": {
                "tiny": {
                    "alias": "tiny",
                    "exact_match,none": 0.25,
                    "exact_match_stderr,none": "N/A",
                    "f1,none": float("nan"),
                }
            },
            "samples": {"tiny": [sample, unscored]},
        }

    evaluator = ModuleType("lmms_eval.evaluator")
    evaluator.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lmms_eval", ModuleType("lmms_eval"))
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", evaluator)
    result = invoke("demo", "lmms:tiny", "--out", tmp_path, "--limit", 7, "--device", "cpu", "--batch", 4)
    assert result.exit_code == 0, result.output
    assert given["model_args"] == f"pretrained={model_path()},device=cpu"
    assert (given["tasks"], given["limit"], given["batch_size"]) == (["tiny"], 7, 4)
    found = json.loads((tmp_path / "results.json").read_text())["tasks"]["lmms:tiny"]
    assert found["metrics"] == {"exact_match": 0.25, "f1": None}
    assert (found["answers"][1]["reference"], found["answers"][1]["score"]) == ("nan", None)
    assert (found["answers"][0]["answer"], found["answers"][0]["score"]) == ("no", 0)
    assert os.path.exists(tmp_path / "report" / "index.html")
    compared = invoke("compare", tmp_path, tmp_path, "--json")
    assert [(each["metric"], each["b"]) for each in json.loads(compared.stdout)] == [("mean score of a sample", 0)]
