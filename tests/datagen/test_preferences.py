"""Preference pairs from drawn and scored answers."""

import dataclasses
import functools
import json
import os
import pickle
import shutil

import pytest

from llava_fast.datagen import preferences as making
from llava_fast.datagen.output import Report
from llava_fast.datagen.preferences import Drawing
from llava_fast.datagen.records import Record
from llava_fast.datagen.samples import Given
from llava_fast.datagen.wording import Judging, Texts
from llava_fast.errors import DataError
from llava_fast.evaluate.model import answers_of
from llava_fast.evaluate.task import Answer
from llava_fast.storage.journal import Journal
from llava_fast.train.data.pairs import read_pairs
from llava_fast.train.data.samples import Source
from tests.support import tiny
from tests.support.replies import asked_text, asker, reply

JUDGING = Texts().read("score", Judging)


def given(name, question="What?", answer="A cat.", **media):
    return Given({"id": name, **media}, "d.json", ((question, answer), ("More?", "No.")))


def asked(*samples, records=(), images=""):
    return making.questions(samples, records, images, Report())


def whole_answers(answer):
    """The same answers as if each had ended by itself, which those of a random model do not."""
    return lambda questions, options: (
        (question, dataclasses.replace(found, finish="stop")) for question, found in answer(questions, options)
    )


def length(question, answer, reference, evidence):
    return len(answer) > len(reference)


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    Image.fromarray(tiny.picture(40, 60, 0)).save(tmp_path / "a.png")
    return tmp_path


def test_captions_are_evidence_or_else_the_answer(tmp_path):
    records = [Record(image="a.jpg", captions=["A cat sits."])]
    records += [Record(image=["a.jpg", "b.jpg"], captions=["Two."]), Record(captions=["Of nothing."])]
    report = Report()
    samples = [
        given("1", image="a.jpg"),
        given("2", image="b.jpg"),
        given("3", image="a.jpg"),
        given("4", video="v.mp4"),
    ]
    assert making.questions([given("0")], records, tmp_path, report)[0].evidence == "A right answer: A cat."
    questions = making.questions(samples, records, tmp_path, report)
    assert [each.evidence for each in questions] == [
        "Captions:\n- A cat sits.",
        "A right answer: A cat.",
        "A right answer: A cat.",
    ]
    assert report.left_out == {"the same question about the same picture": 1}
    assert [each.prompt for each in questions] == ["<image>\nWhat?"] * 2 + ["<video>\nWhat?"]


def test_answers_are_drawn_once(picture, tmp_path):
    model, report = tiny.pair("next").ours, Report()
    answer = whole_answers(functools.partial(answers_of, model))
    questions = asked(given("1", image="a.png"), given("2", question="Why?", image="a.png"), images=picture)
    drawing = Drawing(3, max_tokens=6)
    with Journal(tmp_path / "answers.jsonl") as journal:
        first = making.draw_by_engine(answer, "tiny", questions[:1], drawing, journal, report)
        both = making.draw_by_engine(answer, "tiny", questions, drawing, journal, report)
        assert both[0] == first[0]
        assert len(journal) == 6
        assert making.draw_by_engine(None, "tiny", questions, drawing, journal, report) == both
    with Journal(tmp_path / "other.jsonl") as journal:
        assert making.draw_by_engine(answer, "tiny", questions, drawing, journal, report) == both
    assert len(set(both[0])) > 1
    assert not report.left_out


def test_a_picture_that_cannot_be_read_costs_its_own_answers(picture, tmp_path):
    answer, report = whole_answers(functools.partial(answers_of, tiny.pair("next").ours)), Report()
    questions = asked(given("1", image="none.png"), given("2", image="a.png"), images=picture)
    with Journal(tmp_path / "answers.jsonl") as journal:
        drawn = making.draw_by_engine(answer, "tiny", questions, Drawing(2, max_tokens=4), journal, report)
        assert len(journal) == 2
    assert (drawn[0], all(drawn[1])) == (["", ""], True)
    assert report.left_out == {"answers that the model could not give": 2}
    assert "1: " in report.notes["an error"]


def test_answers_that_are_cut_are_not_kept(picture, tmp_path):
    def answer(questions, options):
        ends = {0: "stop", 1: "length", 2: "stop", 3: "cancelled"}
        text = "" if options["seed"] == 2 else f" {options['seed']} "
        return ((question, Answer(text, finish=ends[options["seed"]])) for question in questions)

    questions = asked(given("1", image="a.png"), images=picture)
    with Journal(tmp_path / "answers.jsonl") as journal:
        for _ in range(2):  # counted again where the answers come from the journal
            report = Report()
            drawn = making.draw_by_engine(answer, "m", questions, Drawing(4), journal, report)
            assert drawn == [["0", "", "", ""]]
            assert report.left_out == {"answers: cut short": 2, "answers: empty": 1}
            answer = None


def test_another_picture_of_the_same_name_is_asked_about_anew(picture, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy2(picture / "a.png", tmp_path / "other")
    seen = []

    def answer(questions, options):
        seen.extend(question.images[0] for question in questions)
        return ((question, Answer(question.images[0])) for question in questions)

    def draw(folder):
        questions = asked(given("1", image="a.png"), images=folder)
        return making.draw_by_engine(answer, "m", questions, Drawing(1), journal, Report())[0][0]

    with Journal(tmp_path / "answers.jsonl") as journal:
        for folder in (picture, picture / "other", picture):
            assert draw(folder) == str(folder / "a.png")
        os.utime(picture / "a.png", ns=(5, 5))
        draw(picture)
    assert len(seen) == 3


def test_videos_reach_the_engine(tmp_path):
    (question,) = asked(given("1", video="v.mp4"), images=tmp_path)
    request = question.to_engine("0").request()
    assert (request["video"], request["images"]) == (str(tmp_path / "v.mp4"), [])
    assert request["messages"] == [{"role": "user", "content": "<video>\nWhat?"}]
    again = pickle.loads(pickle.dumps(question.to_engine("0")))  # as it goes to another process
    assert again.request() == request


def test_answers_by_an_endpoint(picture):
    seen = []

    def answer(request):
        seen.append(request)
        return None if request.draw == 2 else f" answer {request.draw} "

    report, questions = Report(), asked(given("1", image="a.png"), images=picture)
    (drawn,) = making.draw_by_endpoint(asker(answer), questions, Drawing(3), report)
    assert drawn == ["answer 0", "answer 1", ""]
    assert report.left_out == {"answers: no reply": 1}
    assert [part["type"] for part in seen[0].messages[0]["content"]] == ["image_url", "text"]
    assert [request.options["seed"] for request in seen] == [0, 1, 2]


def test_an_endpoints_answers_that_are_cut_or_refused_are_not_kept():
    replies = [reply("Cut", "length"), reply("I will", refusal="not."), reply("Ends.", "content_filter"), "Right."]
    report, asks = Report(), asker(lambda request: replies[request.draw])
    assert making.draw_by_endpoint(asks, asked(given("1")), Drawing(4), report) == [["", "", "", "Right."]]
    assert report.left_out == {"answers: cut short": 1, "answers: refusal": 2}


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("Score: 4", 4),
        ("Reason: 3 of 5 are right.\nScore: 4/5", 4),
        ("**Score:** 4 / 5.\r\n", 4),
        ("- **Score: 4**\n\nThat is all.", 4),
        ("Score: 4.5", None),
        ("Score: -3", None),
        ("Score: +3", None),
        ("Score: 3-4", None),
        ("Score: 2 or 5", None),
        ("Score: 4/10", None),
        ("Score:\n4", None),
        ("Score: 4\nScore: 4", None),
        ("Score: 4\nScore: 2 or 5", None),  # the second takes the first back
        (reply("Reason: so.\nScore: 4", "length"), None),
        (reply("Score: 4", "content_filter"), None),
        (reply("Score: 4", refusal="No."), None),
    ],
)
def test_one_whole_number_at_the_end_of_a_line_is_a_score(said, score):
    report = Report()
    scored = making.score_by_endpoint(asker(lambda request: said), asked(given("1")), [["a"]], JUDGING, report)
    assert scored == [{} if score is None else {"a": score}]
    assert report.left_out == ({"answers without a score": 1} if score is None else {})


def test_scores_are_read_and_never_guessed():
    replies = {
        "good": "Reason: right.\nScore: 5",
        "bold": "**Score: 2**",
        "none": "It is a fine answer, 4 of 5.",
        "two": "Score: 2\nScore: 4",
        "ten": "Score: 10",
        "lost": None,
    }

    def answer(request):
        assert "A right answer: A cat." in asked_text(request)
        return replies[asked_text(request).strip().rpartition(" ")[2]]

    report = Report()
    questions = asked(given("1", image="a.jpg"))
    (scores,) = making.score_by_endpoint(asker(answer), questions, [[*replies, "good", ""]], JUDGING, report)
    assert scores == {"good": 5.0, "bold": 2.0}
    assert report.left_out == {"answers without a score": 3, "answers without a reply": 1}


def test_braces_in_an_answer_stay():
    seen = []
    asks = asker(lambda request: seen.append(asked_text(request)))
    making.score_by_endpoint(asks, asked(given("1", question="{answer}?")), [["{context} {x}"]], JUDGING, Report())
    assert "Question: {answer}?" in seen[0]
    assert "Answer: {context} {x}" in seen[0]


def test_rules_score_too():
    questions = asked(given("1"))
    assert making.score_by_rule("reference", questions, [["a  cat", "A dog", ""]]) == [{"a  cat": 1.0, "A dog": 0.0}]
    by_length = making.score_by_rule(f"{__name__}:length", questions, [["A large cat.", "Cat"]])
    assert by_length == [{"A large cat.": 1.0, "Cat": 0.0}]
    with pytest.raises(DataError, match="the rule 'none'"):
        making.score_by_rule("none", questions, [[]])


def test_good_and_bad_answers_are_paired_and_others_counted(tmp_path):
    questions = asked(*(given(str(n), question=f"What {n}?", image=f"{n}.jpg") for n in range(4)))
    scored = [{"good": 3, "better": 5, "bad": 1, "worse": 2}, {"good": 4}, {"bad": 2}, {}]
    report = Report()
    (pair,) = making.pairs(questions, scored, 3, report)
    assert pair["chosen"] in ("good", "better")
    assert pair["rejected"] in ("bad", "worse")
    assert {key: pair[key] for key in ("id", "image", "prompt")} == {
        "id": "0",
        "image": "0.jpg",
        "prompt": "<image>\nWhat 0?",
    }
    assert report.left_out == {
        "questions: all answers good": 1,
        "questions: all answers bad": 1,
        "questions: no scored answer": 1,
    }
    assert [*making.pairs(questions, scored, 3, Report())] == [pair]
    both = list(making.pairs(questions, scored, 3, Report(), with_reference=True))
    assert (both[1]["chosen"], both[1]["rejected"]) == ("A cat.", "bad")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, both)))
    answers = read_pairs([Source(path=str(tmp_path / "pairs.jsonl"))])
    assert [answers[n].request["messages"][-1]["content"] for n in range(2)] == [pair["chosen"], pair["rejected"]]


def test_the_reference_is_not_paired_with_itself():
    scored, report = [{"a  cat": 1, "A dog.": 2}, {"A cat.": 1}], Report()
    pairs = list(making.pairs(asked(given("1"), given("2", "Why?")), scored, 3, report, with_reference=True))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("A cat.", "A dog.")]
    assert report.left_out == {"questions: all answers bad": 1}


def test_a_judge_that_always_says_the_same_gives_no_pair():
    questions = asked(given("1"))
    scored = making.score_by_endpoint(asker(lambda request: "Score: 5"), questions, [["a", "b"]], JUDGING, Report())
    assert list(making.pairs(questions, scored, 3, Report())) == []
