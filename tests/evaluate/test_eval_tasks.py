"""Tasks: published layouts to questions, answers to metrics worked out by hand, errors that name the file."""

import json
from pathlib import Path

import numpy as np
import pytest

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.run import Plan, limited, run
from llava_fast.evaluate.task import Answer, Question
from llava_fast.evaluate.tasks import TASKS, task_of
from llava_fast.evaluate.tasks.demo import Demo
from tests.support import published

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def read(name: str, data: Path) -> list[Question]:
    published.ALL[name.partition(":")[0]](data)
    task = task_of(name)
    return task.questions(data / task.folder)


def evaluated(name: str, data: Path, answer) -> dict:
    """The task's part of the results with `answer(question)` as the model's answers."""
    published.ALL[name.partition(":")[0]](data)

    def answerer(questions, options):
        for question in questions:
            yield question, Answer(answer(question))

    plan = Plan((name,), data, data / "out", {"path": "fake"})
    return run(plan, answerer)["tasks"][name]


@pytest.mark.parametrize("name", list(published.ALL))
def test_pictures_are_found_and_ids_unique(name, tmp_path):
    questions = read(name, tmp_path)
    assert len({question.id for question in questions}) == len(questions) > 0
    for question in questions:
        assert question.prompt.startswith(question.text) or question.text in question.prompt
        (image,) = question.images
        assert isinstance(image, bytes) or Path(image).is_file()
        assert json.loads(json.dumps(question.reference)) == question.reference


def test_every_task_is_tried_here():
    assert set(TASKS) == {*published.ALL, "demo", "llava"}


@pytest.mark.parametrize("name", list(published.ALL))
def test_a_missing_file_is_named(name, tmp_path):
    task = task_of(name)
    with pytest.raises(EvaluationError, match=task.name) as error:
        task.questions(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_vqav2(tmp_path):
    """ "dog" by 3 of 10: 0.9. "Yes." where all ten say yes: LLaVA's script makes it "yes" before it is scored: 1.
    Mean 95."""
    found = evaluated("vqav2", tmp_path, lambda q: "A dog." if q.id == "420" else "Yes.")
    assert found["metrics"] == {"accuracy": pytest.approx(95)}
    assert found["categories"]["other"] == {"accuracy": pytest.approx(90)}
    assert found["categories"]["yes/no"] == {"accuracy": 100}
    assert found["answers"][0]["prompt"] == "What is it?" + SHORT
    submitted = json.loads((tmp_path / "out" / "vqav2.submission.json").read_text())
    assert submitted == [{"question_id": 420, "answer": "dog"}, {"question_id": 421, "answer": "yes"}]


def test_a_split_without_answers_gets_no_score(tmp_path):
    found = evaluated("vqav2:test-dev", tmp_path, lambda q: "yes")
    assert found["metrics"] == {}
    assert [row["score"] for row in found["answers"]] == [None, None]
    assert json.loads((tmp_path / "out" / "vqav2_test-dev.submission.json").read_text())[0]["answer"] == "yes"


def test_gqa(tmp_path):
    """ "Blue." is read as blue: right; "yes" right; "yes" for no wrong: accuracy 2/3, open 1/1, binary 1/2."""
    found = evaluated("gqa", tmp_path, lambda q: {"100": " Blue.", "101": "yes", "102": "yes"}[q.id])
    assert found["metrics"]["accuracy"] == pytest.approx(200 / 3)
    assert {name: found["categories"][name]["accuracy"] for name in ("open", "binary", "semantic: obj")} == {
        "open": 100,
        "binary": 50,
        "semantic: obj": 0,
    }


def test_vizwiz(tmp_path):
    """ "Unanswerable" is right where all said it; "blue" by 2 of 10: 0.6. Mean 80."""
    found = evaluated("vizwiz", tmp_path, lambda q: "Unanswerable" if "000." in q.id else "Blue")
    assert found["metrics"] == {"accuracy": pytest.approx(80)}
    assert found["categories"]["unanswerable"] == {"accuracy": 100}
    prompt = "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT
    assert found["answers"][0]["prompt"] == prompt


def test_textvqa(tmp_path):
    assert evaluated("textvqa", tmp_path, lambda q: "Nokia.")["metrics"] == {"accuracy": 100}
    (question,) = task_of("textvqa-ocr").questions(tmp_path / "textvqa")
    assert question.prompt == "what brand?\nReference OCR token: NOKIA, 5" + SHORT


def test_scienceqa(tmp_path):
    """Two of three have a picture. "B. two" is right, "I think so" cannot be read: 50%."""
    found = evaluated("scienceqa", tmp_path, lambda q: "B. two" if q.id == "1" else "I think so")
    assert [row["id"] for row in found["answers"]] == ["1", "3"]
    assert (found["metrics"], found["unreadable"]) == ({"accuracy": 50}, 1)
    assert found["answers"][0]["prompt"] == "Context: Look.\nWhich?\nA. one\nB. two\nC. three" + LETTER
    assert found["answers"][1]["prompt"] == "Which?\nA. one\nB. two\nC. three" + LETTER
    assert found["categories"]["natural science"] == {"accuracy": 100}


def test_pope(tmp_path):
    """Each file: yes, yes, no, no. random: all "yes": TP 2, FP 2: precision 1/2, recall 1, F1 2/3, yes ratio 1.
    popular: all right: F1 1. adversarial: yes, no, no, no: TP 1, FN 1: precision 1, recall 1/2, F1 2/3.
    Mean F1 = (2/3 + 1 + 2/3)/3 = 7/9. Pooled: TP 5, FP 2, TN 4, FN 1: F1 10/13, accuracy 9/12, yes ratio 7/12."""
    given = {"random": "yyyy", "popular": "yynn", "adversarial": "ynnn"}

    def answer(question):
        kind, _, number = question.id.partition("-")
        return "Yes" if given[kind][int(number) - 1] == "y" else "No, there is none."

    found = evaluated("pope", tmp_path, answer)
    expected = {"mean F1": 700 / 9, "F1": 1000 / 13, "accuracy": 75, "precision": 500 / 7, "recall": 500 / 6}
    assert found["metrics"] == pytest.approx({**expected, "yes ratio": 700 / 12})
    assert found["categories"]["random"] == pytest.approx(
        {"F1": 200 / 3, "accuracy": 50, "precision": 50, "recall": 100, "yes ratio": 100}
    )


def test_an_undefined_metric_is_null(tmp_path):
    """Never "yes": TP + FP = 0, so precision is undefined; F1 = 0/(0 + 0 + 2)."""
    found = evaluated("pope", tmp_path, lambda q: "no")
    assert found["metrics"]["precision"] is None
    assert found["metrics"]["F1"] == 0


def test_mme(tmp_path):
    """Two pictures a category, each asked yes and no. In "existence" picture 01 both right, picture 02 one right:
    accuracy 3/4, accuracy+ 1/2: 125. In the others always "Yes": accuracy 1/2, accuracy+ 0: 50 each.
    Perception 125 + 9*50 = 575, cognition 4*50 = 200."""

    def answer(question):
        right = question.id.startswith("existence/01") and "b?" in question.text
        return "No." if right else "Yes"

    found = evaluated("mme", tmp_path, answer)
    assert found["metrics"]["perception"] == pytest.approx(575)
    assert found["metrics"]["cognition"] == pytest.approx(200)
    assert found["categories"]["existence"] == {"score": 125, "accuracy": 75, "accuracy+": 50}
    assert (found["questions"], found["units"]) == (56, 28)
    assert found["answers"][0]["prompt"] == "Is it a?" + SHORT


def test_mmbench_is_circular(tmp_path):
    """241 has two options: always "dog" is right in both passes. 252 has three: always "A" is right in the first pass
    alone. Circular 1/2; of the first passes both are right."""
    found = evaluated("mmbench", tmp_path, lambda q: "a dog" if q.unit == "241" else "A")
    assert [row["id"] for row in found["answers"]] == ["241-0", "241-1", "252-0", "252-1", "252-2"]
    assert found["metrics"] == {"circular accuracy": 50, "accuracy of the first pass": 100}
    assert [row["reference"] for row in found["answers"]] == ["B", "A", "A", "C", "B"]
    assert found["answers"][3]["prompt"] == 'A "hint"\nWhich sum?\nA. 2\nB. 3\nC. 1' + LETTER
    assert found["categories"]["perception"]["circular accuracy"] == 100
    assert len({row["cluster"] for row in found["answers"]}) == 1  # both are about one picture


def test_seed_asks_about_pictures(tmp_path):
    found = evaluated("seed", tmp_path, lambda q: "C")
    assert (found["metrics"], found["questions"]) == ({"accuracy": 100}, 1)
    assert list(found["categories"]) == ["Scene Understanding"]


def test_ai2d_asks_the_test_pictures(tmp_path):
    found = evaluated("ai2d", tmp_path, lambda q: "d.")
    assert (found["metrics"], found["questions"]) == ({"accuracy": 100}, 1)
    assert found["answers"][0]["prompt"] == "What is R?\nA. p\nB. q\nC. r\nD. s" + LETTER


def test_chartqa(tmp_path):
    """104 is within 5% of 100; "Anna" is not "Ann"."""
    found = evaluated("chartqa", tmp_path, lambda q: "104" if "many" in q.text else "Anna")
    assert found["metrics"] == {"relaxed accuracy": 50}
    assert found["categories"]["human"] == {"relaxed accuracy": 100}


def test_docvqa(tmp_path):
    """ "may 6" to "May 5": one of five characters: 0.8."""
    assert evaluated("docvqa", tmp_path, lambda q: "may 6")["metrics"] == {"ANLS": pytest.approx(80)}


@pytest.mark.parametrize("name", ["llava-bench", "llava-bench-coco", "llava-bench-wilder", "mm-vet"])
def test_what_a_judge_scores_is_answered(name, tmp_path):
    found = evaluated(name, tmp_path, lambda q: "something")
    assert found["judged"]
    assert found["metrics"] == {}
    assert all(row["score"] is None and row["answer"] == "something" for row in found["answers"])


def test_what_the_judge_reads_of_a_picture(tmp_path):
    (question,) = read("llava-bench-coco", tmp_path)
    assert question.facts["context"] == "A cat.\nA mat.\n\ncat: [0.1, 0.2, 0.3, 0.4]"
    assert [q.categories for q in read("mm-vet", tmp_path)] == [("math", "ocr", "math_ocr"), ("rec",)]


def test_llava_json(tmp_path):
    """Every answer is asked for, after the turns before it. "a cat." is "A cat"; "dog" to "dogs": 3 of 4 characters.
    Exact match 1/2; ANLS: "a cat." to "A cat" is 1 - 1/6, so (5/6 + 3/4)/2. The last question has no reference."""
    turns = ["<image>\nWhat?", "A cat", "And?", "dogs", "And then?"]
    names = ("human", "gpt")
    sample = {
        "id": "s",
        "image": "p.png",
        "conversations": [{"from": names[n % 2], "value": text} for n, text in enumerate(turns)],
    }
    published.put(tmp_path / "q.json", [sample])
    published.picture(tmp_path / "p.png")
    asked = {}

    def answerer(questions, options):
        for question in questions:
            asked[question.id] = question
            yield question, Answer("a cat." if question.text == "What?" else "dog")

    name = f"llava:{tmp_path / 'q.json'}"
    found = run(Plan((name,), Path(), tmp_path / "out", {"path": "fake"}), answerer)["tasks"][name]
    assert found["metrics"] == pytest.approx({"exact match": 50, "ANLS": 100 * (5 / 6 + 3 / 4) / 2})
    assert [row["score"] for row in found["answers"]] == [1, 0, None]
    request = asked["0-2"].request()
    assert [message["content"] for message in request["messages"]] == turns[:3]
    assert request["images"] == [str(tmp_path / "p.png")]


def test_the_demo_asks_what_its_card_measured():
    questions = Demo("3").questions(Path())
    again = Demo("2").questions(Path())
    assert [q.reference for q in again] == [q.reference for q in questions][:8]
    assert np.array_equal(questions[0].images[0], again[0].images[0])
    assert {q.categories[0] for q in questions} == {"read", "count", "largest", "top_left"}


def test_digits_right():
    """Read "1 2" for "1 3 2": one edit of 3 digits; the other three kinds right: accuracy 3/4, digits 1 - 1/3."""
    task = Demo()
    kinds = {"read": "1 3 2", "count": "3", "largest": "3", "top_left": "1"}
    questions = [
        Question(kind, "?", "?", (), reference, (kind,), facts={"digits": 3}) for kind, reference in kinds.items()
    ]
    answers = {kind: Answer(reference if kind != "read" else "1 2") for kind, reference in kinds.items()}
    units = task.units(task.scored(questions, answers))
    assert task.overall(units, np.ones(4)) == pytest.approx({"accuracy": 75, "digits right": 200 / 3})


def respelled(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("vqav2", lambda d: published.put(d / "vqav2/v2_mscoco_val2014_annotations.json", {}), "no 'annotations'"),
        (
            "vqav2",
            lambda d: published.put(d / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": []}),
            "question 420 has no annotation",
        ),
        (
            "vqav2",
            lambda d: respelled(d / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", "420", '"q420"'),
            "'question_id' is \"q420\", not a whole number",
        ),
        (
            "docvqa",
            lambda d: respelled(d / "docvqa/val_v1.0_withQT.json", '"questionId": 9', '"questionId": "nine"'),
            "'questionId' is \"nine\", not a whole number",
        ),
        (
            "mmbench",
            lambda d: respelled(d / "mmbench/mmbench_dev_20230712.tsv", "241", "first"),
            "'index' is \"first\", not a whole number",
        ),
        ("mme", lambda d: next(d.rglob("01.txt")).write_bytes(b"caf\xe9?\tYes\nb?\tNo\n"), "01.txt is not UTF-8"),
        ("ai2d", lambda d: (d / "ai2d/ai2d_test_ids.csv").write_bytes(b"\xe9\n"), "ids.csv is not UTF-8"),
        ("vqav2:dev", lambda d: None, "no split 'dev'"),
        (
            "pope",
            lambda d: published.put_lines(d / "pope/coco_pope_random.json", [{"text": "?"}]),
            "[0] has no 'label'",
        ),
        ("pope", lambda d: published.put_lines(d / "pope/coco_pope_random.json", [3]), "[0] is 3, not an object"),
        ("pope", lambda d: (d / "pope/coco_pope_random.json").write_text("{"), "invalid JSON"),
        ("mme", lambda d: next(d.rglob("01.txt")).write_text("Is it?\tmaybe\n"), "line 1: 'maybe'"),
        ("mme", lambda d: next(d.rglob("01.txt")).write_text("Is it?\tyes\n"), "holds 1 questions"),
        ("ai2d", lambda d: (d / "ai2d/ai2d_test_ids.csv").write_text("7\n"), "picture 7"),
        ("scienceqa", lambda d: published.put(d / "scienceqa/pid_splits.json", {"test": ["9"]}), "no '9'"),
        ("gqa", lambda d: (d / "gqa/data/images/n1.jpg").unlink(), "n1.jpg, which is not there"),
        ("llava", lambda d: None, "needs its file"),
        ("imagenet", lambda d: None, "unknown task 'imagenet'"),
    ],
)
def test_bad_data_is_one_line(name, spoil, says, tmp_path):
    for writer in {*published.ALL.values()}:
        writer(tmp_path)
    spoil(tmp_path)
    with pytest.raises(EvaluationError) as error:
        run(Plan((name,), tmp_path, tmp_path / "out", {}), None)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_limit_keeps_units_whole_and_nests():
    questions = [Question(f"{n}-{p}", "?", "?", (), unit=str(n)) for n in range(20) for p in range(2)]
    few, more = limited(questions, 7), limited(questions, 20)
    assert (len(few), len(more)) == (6, 20)
    assert {q.id for q in few} <= {q.id for q in more}
    assert [q for q in questions if q in more] == more
    assert more != questions[:20]
    with pytest.raises(EvaluationError, match="below one unit"):
        limited(questions, 1)
