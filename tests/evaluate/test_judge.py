"""Judging: what is asked, grades by hand in both orders, replies that cannot be read, an endpoint that misbehaves."""

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from llava_fast.cli.main import app
from llava_fast.endpoint import image_part
from llava_fast.endpoint.replies import Reply
from llava_fast.errors import DataError, EvaluationError
from llava_fast.evaluate.judge import judges
from llava_fast.evaluate.judge.asking import Counts, ask_and_read, read_pair, read_share
from llava_fast.evaluate.judge.judges import Judging, judge
from llava_fast.evaluate.judge.prompts import NAMES, Prompts, write
from llava_fast.evaluate.results import load_results
from llava_fast.evaluate.run import Plan, run
from llava_fast.evaluate.task import Answer, Question, Scored
from llava_fast.evaluate.tasks import task_of
from tests.support import published
from tests.support.scripted_endpoint import completion, scripted


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("8 6\nBecause.", (8, 6)),
        ("8, 6", (8, 6)),
        ("8.5 10", (8.5, 10)),
        ("\n7 9\n", (7, 9)),
        ("Assistant 1: 8 6", None),
        ("8", None),
        ("8 6 7", None),
        ("0 6", None),
        ("8 11", None),
        ("The grades are below.\n8 6", None),
        ("", None),
    ],
)
def test_a_pair_of_grades_is_the_first_line(text, pair):
    assert read_pair(text) == pair


@pytest.mark.parametrize(
    ("text", "share"), [("0.5", 0.5), ("1", 1), ("1.0.", 1), ("1.1", None), ("-0.5", None), ("0.5 or so", None)]
)
def test_a_share_is_all_of_the_reply(text, share):
    assert read_share(text) == share


def scored(number: int, answer: str = "model", reference: str = "reference", **facts) -> Scored:
    facts = facts or {"context": "a {question} in braces"}
    question = Question(str(number), f"Question {number}?", "p", (), reference, ("conv",), facts=facts)
    return Scored(question, Answer(answer), answer, None)


def asker(answer):
    """An Ask that replies by `answer(text of the request, draw)`; a reply of None is a failed request."""

    def ask(requests, title):
        asked = [(request, answer(request.messages[0]["content"], request.draw)) for request in requests]
        ask.requests += requests
        return [None if text is None else Reply.read(completion(text)) for _, text in asked]

    ask.requests = []
    return ask


JUDGING = Judging(Prompts())


def test_pairs_are_graded_in_both_orders():
    """The judge gives the first answer two more than the second would get: reference first 9 and 5, model first 7 and
    7. Means: reference (9 + 7)/2 = 8, model (5 + 7)/2 = 6."""
    ask = asker(lambda text, draw: "9 5" if text.index("reference") < text.index("model\n") else "7 7")
    judged = judge("llava-bench", [scored(1)], None, JUDGING, ask)
    assert judged.scored[0].marks == {"reference": 8, "model": 6}
    assert judged.scored[0].score == 0.6
    assert judged.reviews == [["9 5", "7 7"]]
    one = judge("llava-bench", [scored(1)], None, replace(JUDGING, both_orders=False), ask)
    assert one.scored[0].marks == {"reference": 9, "model": 5}
    assert "a {question} in braces" in ask.requests[0].messages[0]["content"]


def test_the_relative_score_is_the_ratio_of_means():
    """References 8 and 10, model 6 and 3: 9/18 = 50%, not the mean of 75% and 30%."""
    task = task_of("llava-bench")
    marks = [{"reference": 8.0, "model": 6.0}, {"reference": 10.0, "model": 3.0}]
    units = task.units([replace(scored(n), score=0.5, marks=each) for n, each in enumerate(marks)])
    found = task.overall(units, np.ones(2))
    assert found == pytest.approx({"relative score": 50, "reference's score": 90, "model's score": 45})


def test_a_question_with_one_unread_order_has_no_score():
    ask = asker(lambda text, draw: "9 5" if text.index("reference") < text.index("model\n") else "both are fine")
    judged = judge("llava-bench", [scored(1)], None, JUDGING, ask)
    assert (judged.scored[0].score, judged.scored[0].marks) == (None, {})
    assert judged.counts == Counts(requests=2, malformed=3, unread=1, failed=0)
    assert judged.reviews == [["9 5", *["both are fine"] * 3]]


def test_a_malformed_reply_is_asked_again():
    ask = asker(lambda text, draw: "9 5" if draw == 1 else "hm")
    counts = Counts()
    request = asker_request()
    (verdict,) = ask_and_read(ask, [request], [read_pair], 3, "grading", counts)
    assert (verdict.value, verdict.texts) == ((9, 5), ["hm", "9 5"])
    assert counts == Counts(requests=1, malformed=1)
    assert len({each.key("m") for each in ask.requests}) == 2


def asker_request():
    from llava_fast.endpoint import Request

    return Request([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("reply", [completion("9 5", "length"), completion("9 5", refusal="no"), completion(None)])
def test_a_cut_off_or_refused_reply_is_malformed(reply):
    counts = Counts()
    (verdict,) = ask_and_read(
        lambda requests, title: [Reply.read(reply)], [asker_request()], [read_pair], 1, "", counts
    )
    assert verdict.value is None
    assert (counts.malformed, counts.unread) == (1, 1)


def test_a_failed_request_is_no_malformed_reply():
    judged = judge("mm-vet", [scored(1), scored(2)], None, JUDGING, asker(lambda t, d: None if "n 1?" in t else "0.4"))
    assert [each.score for each in judged.scored] == [None, 0.4]
    assert judged.counts == Counts(requests=2, failed=1)


def test_an_answer_that_failed_is_not_judged():
    failed = replace(scored(1), answer=Answer("", error="bad picture"))
    judged = judge("mm-vet", [failed, scored(2)], None, JUDGING, asker(lambda text, draw: "0.4"))
    assert [each.score for each in judged.scored] == [None, 0.4]
    assert judged.reviews == [[], ["0.4"]]
    assert judged.counts == Counts(requests=1)


def test_wilder_shows_the_picture_and_the_reference_has_10(tmp_path, monkeypatch):
    """In both orders the reference's place is said; a reply that gives it another grade is malformed."""
    published.picture(tmp_path / "w.png")
    each = scored(1)
    each = replace(each, question=replace(each.question, images=(str(tmp_path / "w.png"),)))
    asked, lies, read = [], [], []
    monkeypatch.setattr(judges, "image_part", lambda path: read.append(path) or image_part(path))

    def ask(requests, title):
        assert len(read) == 0 or lies  # a picture is read when its request is
        for request in requests:
            picture, text = request.messages[0]["content"]
            assert picture["image_url"]["url"].startswith("data:image/png;base64,")
            asked.append(text["text"])
        return [Reply.read(completion(grade(request.messages[0]["content"][1]["text"]))) for request in requests]

    def grade(text):
        correct = re.search(r"assistant (\d) is known to be correct", text)[1]
        if lies:
            return "9 10"  # the reference, which comes first, has not 10
        return "10 4" if correct == "1" else "6 10"

    judged = judge("llava-bench-wilder", [each], tmp_path, JUDGING, ask)
    assert judged.scored[0].marks == {"reference": 10, "model": 5}
    assert asked[0].index("reference") < asked[0].index("model\n")
    assert asked[1].index("reference") > asked[1].index("model\n")
    lies.append(True)
    lying = judge("llava-bench-wilder", [each], tmp_path, replace(JUDGING, tries=1, both_orders=False), ask)
    assert (lying.scored[0].score, lying.counts.malformed) == (None, 1)


def test_mm_vet_spaces_its_joints_and_takes_means():
    replies = iter(["0.2", "0.6"])
    ask = asker(lambda text, draw: next(replies))
    judged = judge("mm-vet", [scored(1, reference="-1<AND>-5")], None, replace(JUDGING, runs=2), ask)
    assert judged.scored[0].score == pytest.approx(0.4)
    assert ask.requests[0].messages[0]["content"].endswith("Question 1? | -1 <AND> -5 | model |")
    assert len({each.key("m") for each in ask.requests}) == 2


def test_scienceqa_ensembles():
    """Right is A. The model says A, A, B, B. Alone the judge says A; nothing, in words that were not asked for, so that
    it is asked twice; A; A. They differ on questions 3 and 4, where it is asked again: A, and nothing that can be read,
    so the model's B counts.
    Alone 3/4 (1, 3, 4), complement: A, A, A, A; ensemble: A, A, A, B."""
    model = dict(zip("1234", "AABB", strict=True))
    rows = []
    for number, letter in model.items():
        row = scored(int(number), letter, "A", options=["one", "two"], hint="")
        rows.append(replace(row, read=letter, score=float(letter == "A")))

    def answer(text, draw):
        number = re.search(r"Question (\d)", text)[1]
        if "Two models answered" in text:
            assert f"first model:\nThe answer is A.\n\nAnswer of the second model:\n{model[number]}\n" in text
            return "The answer is A." if number == "3" else "Hard to say."
        return "I need the picture." if number == "2" else "The answer is A."

    ask = asker(answer)
    judged = judge("scienceqa", rows, None, replace(JUDGING, tries=2), ask)
    marks = [tuple(each.marks[name] for name in ("alone", "complement", "ensemble")) for each in judged.scored]
    assert marks == [(1, 1, 1), (0, 1, 1), (1, 1, 1), (1, 1, 0)]
    assert judged.counts == Counts(requests=6, malformed=4, unread=2)
    task = task_of("scienceqa")
    found = task.overall(task.units(judged.scored), np.ones(4))
    assert found == {"accuracy": 50, "alone": 75, "complement": 100, "ensemble": 75}


def science(number: int, letter: str) -> Scored:
    return replace(
        scored(number, letter, "A", options=["one", "two"], hint=""), read=letter, score=float(letter == "A")
    )


def test_scienceqa_reads_the_sentence_that_was_asked_for():
    """A reply that begins with a letter states another; "I cannot answer." is a reply in the form, so the model's A
    counts; the letter of a reply without the sentence is not taken."""
    replies = {"1": "B) is too far north. The answer is A.", "2": "It depends. I cannot answer.", "3": "A. one"}
    ask = asker(lambda text, draw: replies[re.search(r"Question (\d)", text)[1]])
    judged = judge("scienceqa", [science(n, "A") for n in (1, 2, 3)], None, replace(JUDGING, tries=1), ask)
    assert [each.marks["alone"] for each in judged.scored] == [1, 0, 0]
    assert [each.marks["complement"] for each in judged.scored] == [1, 1, 1]
    assert judged.counts == Counts(requests=3, malformed=1, unread=1)
    assert judges.NO_ANSWER in Prompts().texts["scienceqa-answer"]


def test_scienceqa_without_a_reply_to_the_second_request_has_no_marks():
    ask = asker(lambda text, draw: None if "Two models answered" in text else "The answer is A.")
    judged = judge("scienceqa", [science(1, "B"), science(2, "A")], None, JUDGING, ask)
    assert [dict(each.marks) for each in judged.scored] == [{}, {"alone": 1, "complement": 1, "ensemble": 1}]
    assert judged.counts == Counts(requests=3, failed=1)
    task = task_of("scienceqa")
    assert task.overall(task.units(judged.scored), np.ones(2)) == {"accuracy": 50}


def test_prompts_may_be_changed(tmp_path):
    write(tmp_path / "own")
    assert {path.stem for path in (tmp_path / "own").iterdir()} == set(NAMES)
    (tmp_path / "own" / "pair.txt").write_text("Q {question} 1 {first} 2 {second}")
    own = Prompts(tmp_path / "own")
    assert own.fill("pair", question="{first}", first="a", second="b", context="c") == "Q {first} 1 a 2 b"
    assert own.digest() != Prompts().digest()
    with pytest.raises(EvaluationError, match="exists"):
        write(tmp_path / "own")
    for text, says in [("{question} {first}", "lacks {second}"), ("{question} {first} {second} {x}", "has {x}")]:
        (tmp_path / "own" / "pair.txt").write_text(text)
        with pytest.raises(EvaluationError, match=re.escape(says)):
            Prompts(tmp_path / "own")
    (tmp_path / "own" / "pair.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        Prompts(tmp_path / "own")


# ---------------------------------------------------------------- the command


@pytest.fixture
def out(tmp_path):
    """Answers to LLaVA-Bench (3), Wilder (1), MM-Vet (2), ScienceQA (2) and POPE."""
    for name in ("llava-bench", "llava-bench-wilder", "mm-vet", "scienceqa", "pope"):
        published.ALL[name](tmp_path)
    plan = Plan(
        ("llava-bench", "llava-bench-wilder", "mm-vet", "scienceqa", "pope"), tmp_path, tmp_path / "out", {"path": "m"}
    )
    run(plan, lambda questions, options: ((question, Answer("B")) for question in questions))
    return plan.out


def text_of(body) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def well_behaved(body):
    text = text_of(body)
    if "grade of the next line" in text:
        return "0.5"
    if "known to be correct" in text:
        return "10 5" if "assistant 1 is known" in text else "5 10"
    if "Two assistants" in text:
        return "8 6\nFine."
    return "The answer is B."


def invoke(server, *arguments: object, text: str | None = None):
    command = ["judge", *map(str, arguments)]
    if server is not None:
        command += ["--endpoint", server.url, "--endpoint-model", "scripted", "--timeout", "0.4", "--attempts", "8"]
    return CliRunner().invoke(app, command, input=text, env={"OPENAI_API_KEY": "sk-a-secret-of-tests"})


def test_the_command_scores_and_asks_nothing_twice(out):
    with scripted(well_behaved) as server:
        result = invoke(server, out, "--yes", "--price-in", 1, "--price-out", 2)
        assert result.exit_code == 0, result.exception
        asked = len(server.bodies)
        again = invoke(server, out, "--yes")
        assert len(server.bodies) == asked == 6 + 2 + 2
    assert "about $" in result.stdout
    assert "all 6 replies are there already" in again.stdout
    tasks = load_results(out)["tasks"]
    assert tasks["llava-bench"]["metrics"]["relative score"] == pytest.approx(100)  # 8 and 6, each in both places
    assert tasks["llava-bench"]["categories"]["detail"]["model's score"] == 70
    assert tasks["llava-bench-wilder"]["metrics"]["relative score"] == pytest.approx(50)
    assert tasks["mm-vet"]["metrics"] == {"score": 50}
    assert set(tasks["mm-vet"]["categories"]) == {"math", "ocr", "math_ocr", "rec"}
    assert tasks["llava-bench"]["judge"]["model"] == "scripted"
    assert "judge" not in tasks["scienceqa"]
    assert tasks["llava-bench"]["intervals"]["relative score"] == pytest.approx([100, 100])
    assert tasks["llava-bench"]["category_intervals"]["conv"]["relative score"] == pytest.approx([100, 100])
    kept = (out / "judge" / "llava-bench.replies.jsonl").read_text().splitlines()
    assert len(kept) == 6
    assert all("reply" in json.loads(line) for line in kept)
    assert "8 6" in (out / "report" / "index.html").read_text()


def test_scienceqa_is_judged_where_it_is_named(out):
    with scripted(well_behaved) as server:
        result = invoke(server, out, "scienceqa", "--yes")
    assert result.exit_code == 0, result.exception
    found = load_results(out)["tasks"]["scienceqa"]["metrics"]
    assert found == {"accuracy": 50, "alone": 50, "complement": 50, "ensemble": 50}


def test_eval_again_keeps_the_grades_of_the_same_answers(out):
    with scripted(well_behaved) as server:
        assert invoke(server, out, "llava-bench", "scienceqa", "--yes").exit_code == 0
    judged = load_results(out)["tasks"]
    plan = Plan(("llava-bench", "scienceqa"), out.parent, out, {"path": "m"})
    assert run(plan, None)["tasks"] == judged
    other = judged["llava-bench"]["answers"][0]["id"]

    def answerer(questions, options):
        for question in questions:
            yield question, Answer("C" if question.id == other else "B")

    found = run(replace(plan, fresh=True), answerer)["tasks"]["llava-bench"]
    rows = found["answers"]
    assert (rows[0]["score"], "marks" in rows[0], "review" in rows[0]) == (None, False, False)
    assert rows[1:] == judged["llava-bench"]["answers"][1:]
    assert found["judge"] == {**judged["llava-bench"]["judge"], "without_score": 1}
    assert found["units"] == len(rows) - 1


@pytest.mark.parametrize("seed", range(3))
def test_an_endpoint_that_fails_stalls_truncates_and_lies(out, seed):
    """Faults at random, and lies: grades out of range and chatter. A score is that of a reply that could be read."""
    rng = np.random.default_rng(seed)
    faults = ("500", "drop", "truncate", "stall", "not json", "no choices")
    lies = ("I would say eight.", "11 3", "7", "0.5 0.5", "The first is better.", "")

    def answer(body):
        return lies[rng.integers(len(lies))] if rng.random() < 0.3 else well_behaved(body)

    def fault(body, number):
        return faults[rng.integers(len(faults))] if rng.random() < 0.3 else None

    with scripted(answer, fault) as server:
        result = invoke(server, out, "llava-bench", "mm-vet", "--yes", "--tries", 2, "--concurrency", 2)
    assert result.exit_code == 0, result.exception
    tasks = load_results(out)["tasks"]
    for row in tasks["llava-bench"]["answers"]:
        assert row.get("marks") in ({"reference": 7, "model": 7}, None)
        assert (row["score"] is None) == ("marks" not in row)
        assert row["review"]
    for row in tasks["mm-vet"]["answers"]:
        assert row["score"] in (0.5, None)
    for name in ("llava-bench", "mm-vet"):
        counts, rows = tasks[name]["judge"], tasks[name]["answers"]
        assert counts["without_score"] == sum(row["score"] is None for row in rows)
        read = sum(len(row["review"]) for row in rows)
        assert read == counts["malformed"] + counts["requests"] - counts["unread"] - counts["failed"]


def test_nothing_is_asked_without_a_yes(out):
    with scripted(well_behaved) as server:
        assert invoke(server, out, "mm-vet", text="n\n").exit_code == 1
        assert invoke(server, out, "mm-vet", text="").exit_code == 1
        shown = invoke(server, out, "mm-vet", "--dry-run")
        assert server.bodies == []
        assert invoke(server, out, "mm-vet", text="y\n").exit_code == 0
        assert len(server.bodies) == 2
    assert "x? | -1 <AND> -5 | B |" in shown.stdout
    assert "2 requests to ask" in shown.stdout


def test_a_killed_judge_goes_on(out):
    """Stopped by its fourth request, it has three replies; the rest are asked by the next run."""
    with scripted(well_behaved, lambda body, number: "401" if number >= 3 else None) as server:
        result = invoke(server, out, "llava-bench", "--yes", "--concurrency", 1)
        assert result.exit_code == 1
    with scripted(well_behaved) as server:
        assert invoke(server, out, "llava-bench", "--yes").exit_code == 0
        assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gqa"], "gqa is not answered (these are: llava-bench"),
        (["pope"], "no judge scores pope"),
        (["--prompts", "nowhere"], "no folder of prompts nowhere"),
    ],
)
def test_what_cannot_be_judged_is_one_line(out, arguments, says):
    with scripted(well_behaved) as server:
        result = invoke(server, out, *arguments, "--yes")
    assert result.exit_code == 1
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)


def test_our_prompts_as_files(tmp_path):
    (tmp_path / "file").touch()
    refused = invoke(None, tmp_path, "--write-prompts", tmp_path / "file" / "own")
    assert isinstance(refused.exception, EvaluationError)
    assert "cannot be made a folder (Not a directory)" in str(refused.exception)
    result = invoke(None, tmp_path, "--write-prompts", tmp_path / "own")
    assert result.exit_code == 0, result.exception
    assert sorted(os.listdir(tmp_path / "own")) == sorted(f"{name}.txt" for name in NAMES)
