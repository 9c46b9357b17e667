"""Answers are kept as they come: a killed evaluation goes on, with the answers of the same model and data only."""

import base64
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.records import Records
from llava_fast.evaluate.results import load_results, save, scored_of
from llava_fast.evaluate.run import Plan, run
from llava_fast.evaluate.task import Answer
from tests.support import published


class Fake:
    """Answers "yes"; stops after `most` answers, as if killed."""

    def __init__(self, most: int = 10**6, text: str = "yes") -> None:
        self.most, self.text, self.asked = most, text, []

    def __call__(self, questions, options):
        for question in questions:
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append(question.id)
            yield question, Answer(self.text)


@pytest.fixture
def plan(tmp_path) -> Plan:
    published.pope(tmp_path / "data")
    return Plan(("pope",), tmp_path / "data", tmp_path / "out", {"path": "one"})


def lines(plan: Plan) -> list[bytes]:
    return (plan.out / "answers" / "pope.jsonl").read_bytes().splitlines(keepends=True)


def test_it_goes_on_where_it_stopped(plan):
    first = Fake(5)
    with pytest.raises(KeyboardInterrupt):
        run(plan, first)
    second = Fake()
    results = run(plan, second)
    assert len(first.asked) == 5
    assert len(second.asked) == 7
    assert not set(first.asked) & set(second.asked)
    whole = run(replace(plan, out=plan.out / "at-once"), Fake())
    assert results["tasks"]["pope"]["metrics"] == whole["tasks"]["pope"]["metrics"]
    third = Fake()
    assert run(plan, third) == results
    assert third.asked == []


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_line_is_cut_off_and_asked_again(plan, cut):
    with pytest.raises(KeyboardInterrupt):
        run(plan, Fake(5))
    path = plan.out / "answers" / "pope.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = Fake()
    run(plan, again)
    assert len(again.asked) == 8
    assert all(json.loads(line) for line in lines(plan))
    assert len(lines(plan)) == 13


def test_a_torn_first_line(plan):
    path = plan.out / "answers" / "pope.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"evalu')
    run(plan, Fake())
    assert len(lines(plan)) == 13


def test_a_line_that_is_no_json_is_named(plan):
    run(plan, Fake())
    path = plan.out / "answers" / "pope.jsonl"
    path.write_bytes(b"".join([*lines(plan)[:3], b"???\n", *lines(plan)[3:]]))
    with pytest.raises(EvaluationError, match="line 4 is no JSON"):
        run(plan, Fake())
    path.write_bytes(path.read_bytes().replace(b"???", b'{"id": "x"}'))
    with pytest.raises(EvaluationError, match="line 4 is no answer"):
        run(plan, Fake())


def test_answers_of_other_settings_are_refused(plan):
    run(plan, Fake())
    other = replace(plan, max_new_tokens=3)
    with pytest.raises(EvaluationError, match="max_new_tokens 64, not 3"):
        run(other, Fake())
    fresh = Fake(text="no")
    assert run(replace(other, fresh=True), fresh)["tasks"]["pope"]["metrics"]["yes ratio"] == 0
    assert len(fresh.asked) == 12


def test_answers_of_another_model_are_refused(plan):
    run(plan, Fake())
    other = replace(plan, model={"path": "two"})
    asked = Fake()
    with pytest.raises(EvaluationError, match="of another model"):
        run(replace(other, fresh=True), asked)
    (plan.out / "results.json").unlink()  # killed before there were results
    with pytest.raises(EvaluationError, match=r"model \{'path': 'one'\}, not \{'path': 'two'\}"):
        run(other, asked)
    assert asked.asked == []


def test_changed_data_is_refused(plan):
    run(plan, Fake())
    path = plan.data / "pope" / "coco_pope_popular.json"
    path.write_text(path.read_text().replace("Is there a 2?", "Is there any?"))
    with pytest.raises(EvaluationError, match="question 'popular-3' is not the one that was answered"):
        run(plan, Fake())


def test_data_may_move(plan):
    run(plan, Fake())
    moved = plan.data.rename(plan.data.parent / "moved")
    again = Fake()
    run(replace(plan, data=moved), again)
    assert again.asked == []


def test_a_smaller_limit_takes_the_answers_that_are_there(plan):
    run(plan, Fake())
    again = Fake()
    assert run(replace(plan, limit=5), again)["tasks"]["pope"]["questions"] == 5
    assert again.asked == []


def test_shards_are_answered_apart_and_scored_together(plan):
    parts = []
    for number in range(3):
        part = Fake()
        assert run(replace(plan, shard=(number, 3)), part) == {}
        parts += part.asked
    assert len(parts) == len(set(parts)) == 12
    last = Fake()
    results = run(plan, last)
    assert last.asked == []
    assert results["tasks"]["pope"] == run(replace(plan, out=plan.out / "b"), Fake())["tasks"]["pope"]
    again = Fake()
    run(replace(plan, shard=(1, 3), fresh=True), again)
    assert len(again.asked) == 4


def test_a_fresh_shard_takes_nothing_that_is_there(plan):
    """Answers of a run without shards, of its own and of a run with other shards are forgotten, those of the other
    shard of this run are kept; after the data changed too."""
    run(plan, Fake())
    run(replace(plan, shard=(0, 3), fresh=True), Fake())
    path = plan.data / "pope" / "coco_pope_popular.json"
    path.write_text(path.read_text().replace("Is there a 2?", "Is there any?"))
    parts = [Fake(text="no"), Fake(text="no")]
    for number, part in enumerate(parts):
        run(replace(plan, shard=(number, 2), fresh=True), part)
        assert len(part.asked) == 6
    last = Fake()
    found = run(plan, last)["tasks"]["pope"]
    assert last.asked == []
    assert {row["answer"] for row in found["answers"]} == {"no"}


def test_two_runs_do_not_write_one_file(plan):
    with (
        Records(plan.out / "answers", "pope", {}),
        pytest.raises(EvaluationError, match="being written by another run"),
    ):
        run(plan, Fake())


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_whole_answers(plan, monkeypatch):
    real, written = os.write, []

    def full(file, data):
        if b'"id"' not in bytes(data) and not written:
            return real(file, data)
        written.append(data)
        if len(written) == 1:
            return real(file, bytes(data[:10]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(EvaluationError, match=r"pope\.jsonl cannot be written: No space left on device"):
        run(plan, Fake())
    monkeypatch.undo()
    assert len(lines(plan)) == 1  # the settings; of the answer that was cut short nothing is left
    assert lines(plan)[0].endswith(b"\n")
    last = Fake()
    run(plan, last)
    assert len(last.asked) == 12


def test_a_failed_answer_is_wrong_and_counted(plan):
    def failing(questions, options):
        for number, question in enumerate(questions):
            failed = number == 0  # "yes" is right there
            yield question, Answer("", finish="error", error="bad picture") if failed else Answer("yes")

    found = run(plan, failing)["tasks"]["pope"]
    assert found["errors"] == 1
    assert found["metrics"]["recall"] == pytest.approx(500 / 6)
    assert found["answers"][0]["error"] == "bad picture"
    assert (found["answers"][0]["read"], found["answers"][0]["score"]) == (None, 0)


def test_a_failed_answer_is_asked_again_by_the_next_run(plan):
    def failing(questions, options):
        for number, question in enumerate(questions):
            yield question, Answer("", finish="error", error="out of memory") if number < 2 else Answer("yes")

    assert run(plan, failing)["tasks"]["pope"]["errors"] == 2
    again = Fake()
    found = run(plan, again)["tasks"]["pope"]
    assert again.asked == [row["id"] for row in found["answers"][:2]]
    assert found["errors"] == 0
    third = Fake()
    run(plan, third)
    assert third.asked == []


def test_results_of_several_tasks_stand_together(plan):
    published.gqa(plan.data)
    run(plan, Fake())
    results = run(replace(plan, tasks=("gqa",)), Fake())
    assert list(results["tasks"]) == ["pope", "gqa"]
    assert load_results(plan.out) == results


def test_pictures_as_data_uris(plan, tmp_path):
    """A URI is longer than a file name may be, and is neither a path to be made relative nor to be joined."""
    uri = "data:image/png;base64," + "A" * 3000 + "//../" + base64.b64encode(published.picture_bytes()).decode()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "yes"}]
    published.put(tmp_path / "q.json", [{"id": "s", "image": uri, "conversations": turns}])
    name = f"llava:{tmp_path / 'q.json'}"
    plan = replace(plan, tasks=(name,), pictures=True)
    found = run(plan, Fake())["tasks"][name]
    row = found["answers"][0]
    assert row["images"] == [uri]
    assert scored_of(row, found["folder"]).question.images == (uri,)
    moved = replace(plan, data=tmp_path / "elsewhere")
    again = Fake()
    run(moved, again)
    assert again.asked == []


def test_results_saved_at_the_same_time_are_all_there(tmp_path):
    """16 threads save a task each: none reads what another is about to replace, and no temporary file is left."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: save(tmp_path, {"path": "m"}, {}, {f"demo:{n}": {}}), range(16)))
    assert len(load_results(tmp_path)["tasks"]) == 16
    assert not list(tmp_path.glob("*.new")) + list(tmp_path.glob(".*.new"))


def test_no_results_is_one_line(tmp_path):
    with pytest.raises(EvaluationError, match="cannot be read"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(EvaluationError, match=r"no results\.json"):
        load_results(tmp_path)


KILLED = """
import os, signal, sys, time
from pathlib import Path
from llava_fast.evaluate.run import Plan, run
from llava_fast.evaluate.task import Answer

def answerer(questions, options):
    for number, question in enumerate(questions):
        yield question, Answer("yes" * (number % 40))
        print(number, flush=True)
        time.sleep(0.003)

run(Plan(("pope",), Path(sys.argv[1]), Path(sys.argv[2]), {"path": "one"}), answerer)
"""


def test_kills_at_random(plan):
    """kill -9 three times, after a random number of answers and a random moment more; what was answered before is never
    asked again, and nothing is lost or twice."""
    rng = np.random.default_rng(18)
    answered = 0
    for _ in range(3):
        after = int(rng.integers(0, 4))
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(plan.data), str(plan.out)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
            for _ in range(after):
                process.stdout.readline()
            time.sleep(rng.uniform(0, 0.006))
            os.kill(process.pid, signal.SIGKILL)
        before, answered = answered, len(lines(plan)) - 1
        assert answered >= min(12, before + after)
    last = Fake()
    run(plan, last)
    assert len(last.asked) == 12 - answered
    assert len({json.loads(line)["id"] for line in lines(plan)[1:]}) == len(lines(plan)) - 1 == 12
