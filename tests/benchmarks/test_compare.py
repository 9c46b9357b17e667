"""`benchmarks compare` on a repository of two commits whose suite is a stub: no build, no model."""

import json
import subprocess

import pytest
from typer.testing import CliRunner

from benchmarks import compare, machine
from benchmarks.__main__ import app

STUB = """
import json, os, sys
row = {{"suite": "s", "model": "m", "case": "c", "backend": "ours", "median": {median}}}
row["check"] = {{"passed": {passed}}}
reference = row | {{"backend": "reference", "check": None, "median": 1.0}}
open(os.environ["SEEN"], "a").write("{name}")
open(sys.argv[sys.argv.index("--output-json") + 1], "w").write(json.dumps({{"rows": [row, reference][: {rows}]}}))
sys.exit(0 if {passed} else 1)
"""


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """The file to which each run of a stub adds its name; commits slow, fast, wrong and short are there."""
    root = tmp_path / "repository"
    root.mkdir()

    def git(*words):
        subprocess.run(["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    git("init", "-q")
    kinds = {"slow": (0.5, True, 2), "fast": (0.25, True, 2), "wrong": (0.1, False, 2), "short": (0.5, True, 1)}
    for name, (median, passed, rows) in kinds.items():
        (root / "suite.py").write_text(STUB.format(name=name[0], median=median, passed=passed, rows=rows))
        git("add", ".")
        git("commit", "-qm", name)
        git("tag", name)
    monkeypatch.setattr(compare, "ROOT", root)
    monkeypatch.setattr(machine, "describe", lambda *_: {"kind": "stub"})
    monkeypatch.setattr(machine, "versions", dict)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return tmp_path / "seen"


def run(first, second, *options):
    return CliRunner().invoke(app, ["compare", first, second, "--run", "suite.py", "--build", "", *options])


def test_two_commits_take_turns_and_get_a_ratio(seen, tmp_path):
    output = tmp_path / "out.json"
    result = run("slow", "fast", "--rounds", "2", "--output-json", str(output))
    assert result.exit_code == 0, result.output
    assert seen.read_text() == "sffs"
    content = json.loads(output.read_text())
    ours, reference = content["ratios"]
    assert (ours["backend"], ours["ratio"], ours["least"], ours["most"]) == ("ours", 2.0, 2.0, 2.0)
    assert (reference["ratio"], content["machine"], content["A"]["name"]) == (1.0, {"kind": "stub"}, "slow")
    assert len(content["runs"]) == 4
    assert "2.000x as fast" in result.output
    assert "500" in result.output
    trees = subprocess.run(
        ["git", "-C", compare.ROOT, "worktree", "list"], capture_output=True, text=True, check=False
    ).stdout
    assert len(trees.splitlines()) == 1


def test_the_control_is_the_first_commit_against_itself(seen, tmp_path):
    output = tmp_path / "out.json"
    result = run("slow", "fast", "--rounds", "2", "--control", "--output-json", str(output))
    assert result.exit_code == 0, result.output
    assert seen.read_text() == "sfssfs"
    content = json.loads(output.read_text())
    assert [row["ratio"] for row in content["control"]] == [1.0, 1.0]
    assert [row["ratio"] for row in content["ratios"]] == [2.0, 1.0]
    assert "slow again" in result.output


@pytest.mark.parametrize(("second", "why"), [("wrong", "check failed"), ("short", "only in A")])
def test_what_cannot_be_compared_has_no_ratio(seen, second, why):
    result = run("slow", second, "--rounds", "1")
    assert result.exit_code == 1
    assert why in result.output
    assert "it has no ratio" in result.output


def test_the_spread_is_that_of_the_rounds():
    def rows(seconds):
        return [{"suite": "s", "model": "m", "case": "c", "backend": "b", "check": None, "median": seconds}]

    times = {("A", 0): 2.0, ("B", 0): 1.0, ("A", 1): 3.0, ("B", 1): 2.0, ("A", 2): 8.0, ("B", 2): 2.0}
    runs = [{"side": side, "round": number, "rows": rows(t)} for (side, number), t in times.items()]
    (row,) = compare.ratios(runs)
    assert (row["ratio"], row["least"], row["most"]) == (2.0, 1.5, 4.0)
    assert (row["A_seconds"], row["B_seconds"]) == (3.0, 2.0)


def test_an_unknown_commit_is_refused_before_anything_runs(seen):
    result = run("slow", "nowhere")
    assert result.exit_code == 2
    assert "'nowhere' is no commit" in result.output.replace("\n", " ")
    assert not seen.exists()
