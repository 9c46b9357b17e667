"""Comparisons: differences by hand, intervals against exact ones, the same draws for both."""

import json
from dataclasses import replace

import numpy as np
import pytest

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.compare import compare
from llava_fast.evaluate.run import Plan, run
from llava_fast.evaluate.task import Answer
from tests.support import published


def evaluated(plan: Plan, answer):
    return run(plan, lambda questions, options: ((question, Answer(answer(question))) for question in questions))


@pytest.fixture
def plan(tmp_path) -> Plan:
    """40 questions about 20 pictures; the right answer is always "a"."""
    rows = [
        {
            "id": str(n),
            "image": f"{n // 2}.png",
            "conversations": [{"from": "human", "value": f"<image>\nQuestion {n}?"}, {"from": "gpt", "value": "a"}],
        }
        for n in range(40)
    ]
    published.put(tmp_path / "q.json", rows)
    for number in range(20):
        published.picture(tmp_path / f"{number}.png", number)
    return Plan((f"llava:{tmp_path / 'q.json'}",), tmp_path, tmp_path / "a", {"path": "a"})


def test_differences_and_intervals(plan, tmp_path):
    """B is right about both questions of 10 pictures, A about none. The mean over 20 drawn pictures of a 0/1 column
    with ten ones is binomial(20, 1/2)/20: 95% from 30 to 70 (P(X <= 5) = 2.1%, P(X <= 6) = 5.8%)."""
    evaluated(plan, lambda q: "b")
    right = {str(n) for n in range(20)}
    evaluated(replace(plan, out=tmp_path / "b", model={"path": "b"}), lambda q: "a" if q.id[:-2] in right else "b")
    found = {each.metric: each for each in compare(tmp_path / "a", tmp_path / "b", resamples=4000)}["exact match"]
    assert (found.a, found.b, found.units) == (0, 50, 40)
    assert (found.low, found.high) == (30, 70)
    assert found.better == 1
    assert compare(tmp_path / "a", tmp_path / "b", resamples=500, seed=3) == compare(
        tmp_path / "a", tmp_path / "b", resamples=500, seed=3
    )


def test_draws_are_paired(plan, tmp_path):
    """Both are right about the same questions: every resample has a difference of 0, though each alone varies."""
    for name in ("a", "b"):
        evaluated(
            replace(plan, out=tmp_path / name, model={"path": name}), lambda q: "a" if int(q.id[:-2]) % 4 < 2 else "b"
        )
    found = compare(tmp_path / "a", tmp_path / "b")[0]
    assert (found.low, found.high, found.better) == (0, 0, 0.5)


def test_metrics_that_are_no_means(tmp_path):
    """POPE's F1 and MME's sums are computed anew on each draw, for both the same."""
    for writer in (published.pope, published.mme):
        writer(tmp_path)
    plan = Plan(("pope", "mme"), tmp_path, tmp_path / "a", {"path": "a"})
    evaluated(plan, lambda q: "yes")
    evaluated(replace(plan, out=tmp_path / "b", model={"path": "b"}), lambda q: q.reference)
    found = {(each.task, each.metric): each for each in compare(tmp_path / "a", tmp_path / "b", resamples=200)}
    pope, mme = found["pope", "mean F1"], found["mme", "perception"]
    assert (pope.a, pope.b) == pytest.approx((200 / 3, 100))
    assert (mme.a, mme.b) == pytest.approx((500, 2000))
    assert mme.low <= 1500 <= mme.high
    assert np.isfinite([pope.low, pope.high]).all()


def test_what_cannot_be_compared(plan, tmp_path):
    evaluated(plan, lambda q: "b")
    path = tmp_path / "a" / "results.json"
    results = json.loads(path.read_text())
    (name,) = results["tasks"]

    def changed(change):
        other = json.loads(path.read_text())
        change(other["tasks"])
        (tmp_path / "c.json").write_text(json.dumps(other))
        return tmp_path / "c.json"

    with pytest.raises(EvaluationError, match="no task in common"):
        compare(path, changed(lambda tasks: tasks.update(gqa=tasks.pop(name))))
    with pytest.raises(EvaluationError, match="is not the same in both"):
        compare(path, changed(lambda tasks: tasks[name]["answers"][0].update(prompt="Other?")))
    with pytest.raises(EvaluationError, match="scores for the same questions"):
        compare(path, changed(lambda tasks: [row.update(score=None) for row in tasks[name]["answers"]]))
