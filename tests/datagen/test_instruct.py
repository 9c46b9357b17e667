"""Instruction data from captions: what is asked for, and what becomes of replies."""

from collections import Counter

import pytest

from llava_fast.datagen.instruct import MIX, Instruct, shares
from llava_fast.datagen.output import Report
from llava_fast.datagen.records import Record
from llava_fast.datagen.wording import FOLDER, Concepts, Judging, Patterns, Prompt, Questions, Texts, copy_texts
from llava_fast.errors import DataError
from tests.support.replies import asked_text, asker, reply

RECORDS = [Record(id=str(n), image=f"{n}.jpg", captions=[f"Cat number {n}."]) for n in range(158)]


def conversation(request):
    about = asked_text(request).splitlines()[1]
    return f"Question: What is it?\nAnswer: It is this: {about}\n**Question 2:** Is it {about}?\n**Answer:** Yes."


def made(answer, records=RECORDS[:1], **options):
    """(samples, report) of one kind unless told otherwise."""
    maker = Instruct(**{"mix": {"conversation": 1}, **options})
    report = Report()
    return list(maker.make(records, asker(answer), report)), report


def test_shares_are_those_of_the_158k():
    assert shares(MIX, 158_000) == {"conversation": 58_000, "detail": 23_000, "reasoning": 77_000}
    assert sum(shares(MIX, 7).values()) == 7


def test_kinds_are_spread_over_records():
    tasks = Instruct().tasks(RECORDS)
    assert Counter(task.kind for task in tasks) == {"conversation": 58, "detail": 23, "reasoning": 77}
    assert len({task.record.id for task in tasks}) == 158
    assert tasks == Instruct().tasks(RECORDS)
    assert tasks != Instruct(seed=1).tasks(RECORDS)
    twice = Instruct(count=316).tasks(RECORDS)
    assert len({(task.kind, task.record.id) for task in twice}) == 316
    assert set(Counter(task.record.id for task in twice).values()) == {2}


def test_a_conversation_becomes_llavas_turns():
    (sample,), report = made(conversation)
    assert (sample["id"], sample["image"]) == ("0-conversation", "0.jpg")
    assert [turn["from"] for turn in sample["conversations"]] == ["human", "gpt"] * 2
    first, answer, second, last = [turn["value"] for turn in sample["conversations"]]
    assert first in ("<image>\nWhat is it?", "What is it?\n<image>")
    assert (answer, last) == ("It is this: - Cat number 0.", "Yes.")
    assert second == "Is it - Cat number 0.?"
    assert report.to_json() == {"made": {"conversation": 1}, "left_out": {}}


def test_the_placeholder_stands_on_either_side():
    samples, _ = made(conversation, RECORDS[:40])
    before = sum(sample["conversations"][0]["value"].startswith("<image>") for sample in samples)
    assert 8 < before < 32


def test_the_prompt_holds_examples_and_the_record():
    maker = Instruct(mix={"conversation": 1})
    request = maker.request(maker.tasks(RECORDS[:1])[0])
    roles = [message["role"] for message in request.messages]
    assert roles == ["system", *["user", "assistant"] * len(maker.prompts["conversation"].examples), "user"]
    assert asked_text(request) == "Captions:\n- Cat number 0."
    assert request.options["max_tokens"] > 0


def test_a_description_gets_a_question_of_the_list():
    samples, _ = made(lambda request: f"Here is {asked_text(request)[12:]}", RECORDS[:30], mix={"detail": 1})
    questions = {sample["conversations"][0]["value"].replace("<image>", "").strip() for sample in samples}
    assert questions <= set(Texts().read("detail", Prompt).questions)
    assert len(questions) > 5


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (None, "no reply"),
        (reply(None, refusal="No."), "refusal"),
        (reply("Question: a\nAnswer: b", "content_filter"), "refusal"),
        (reply("Question: a\nAnswer: b", "length"), "cut short"),
        (reply("  "), "empty"),
        (reply("Question: a\nAnswer: \ud800"), "half a surrogate pair"),
        ("I'm sorry, but I cannot see any image.", "refusal"),
        ("Here is what I think about it.", "no questions and answers"),
        ('{"question": "What?", "answer": "A cat."}', "no questions and answers"),
        ("Answer: A cat.\nQuestion: What?", "wrong roles"),
        ("Question: What?\nQuestion: Why?\nAnswer: A cat.", "wrong roles"),
        ("Question: What?", "wrong roles"),
        ("Question: What?\nAnswer:", "empty"),
        ("Question:\nAnswer: A cat.", "empty"),
        ("Question: What?\nAnswer: The caption says that it is a cat.", "speaks of captions or boxes"),
        ("Question: What is in the bounding box?\nAnswer: A cat.", "speaks of captions or boxes"),
        ("Question: Where?\nAnswer: At 0.312, 0.555.", "speaks of captions or boxes"),
        ("Question: Who?\nAnswer: As an AI language model, I see nobody.", "refusal"),
        ("Question: <image> What?\nAnswer: A cat.", "roles or placeholders inside a text"),
        ("Question: What?\nAnswer: A cat.\nUser: And then?", "roles or placeholders inside a text"),
    ],
)
def test_what_is_left_out_and_why(given, why):
    samples, report = made(lambda request: given)
    assert (samples, report.left_out) == ([], {why: 1})


def test_ordinary_answers_pass():
    texts = (
        "It is described on the sign.",
        "The list of players hangs on the wall.",
        "She cannot see the dog behind her.",
        "There are 2, maybe 3, cats.",
        "The user interface of the phone is blue.",
    )
    for text in texts:
        samples, report = made(lambda request, text=text: f"Question: What?\nAnswer: {text}")
        assert samples, report.left_out


def test_turns_from_the_first_bad_one_on_are_cut_off():
    text = "Question: a?\nAnswer: b.\nQuestion: c?\nAnswer: As an AI, no.\nQuestion: e?\nAnswer: f."
    (sample,), report = made(lambda request: text)
    assert [turn["value"] for turn in sample["conversations"]][1:] == ["b."]
    assert report.left_out == {"turns cut off: refusal": 2}
    (sample,), report = made(lambda request: "Question: a?\nAnswer: b.\nQuestion: A?\nAnswer: c.")
    assert report.left_out == {"turns cut off: repeated question": 1}


def test_a_pair_is_one_question_and_answer():
    _, report = made(conversation, mix={"reasoning": 1})
    assert report.left_out == {"not one question and answer": 1}


def test_an_endpoint_that_always_says_the_same_gives_one_sample():
    samples, report = made(lambda request: "Question: What?\nAnswer: Fine.", RECORDS[:5])
    assert (len(samples), report.left_out) == (1, {"duplicate": 4})
    samples, report = made(lambda request: "It is fine.", RECORDS[:5], mix={"detail": 1})  # whatever is asked
    assert (len(samples), report.left_out) == (1, {"duplicate": 4})


def test_short_answers_may_repeat_where_their_kind_says_so(tmp_path):
    text = "form: pair\nsystem: Ask yes or no.\nmay_repeat: true\n"
    (tmp_path / "yes.yaml").write_text(text)
    options = {"texts": Texts(tmp_path), "mix": {"yes": 1}}
    same_picture = RECORDS[0].model_copy(update={"id": "again"})
    samples, report = made(lambda request: "Question: Is it?\nAnswer: Yes.", [*RECORDS[:3], same_picture], **options)
    assert (len(samples), report.left_out) == (3, {"duplicate": 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mix": {"haiku": 1}}, "there is no haiku.yaml among the texts; there are brief, "),
        ({"mix": {"conversation": 0}}, "no share above 0"),
        ({"mix": {"conversation": -1}}, "no share above 0"),
        ({"mix": {"text": 1}}, "1 samples of kind text are asked for, and 0 of 1 records have words"),
        ({"count": 3}, "3 samples of kind conversation are asked for, and 1 of 1 records have captions"),
    ],
)
def test_what_cannot_be_made(options, words):
    with pytest.raises(DataError, match=words):
        made(conversation, **options)
    with pytest.raises(DataError, match="no record"):
        made(conversation, [])


def test_a_users_texts_come_first(tmp_path):
    assert len(copy_texts(tmp_path)) == len(list(FOLDER.glob("*.yaml")))
    (tmp_path / "haiku.yaml").write_text("form: answer\nsystem: Write a haiku.\nquestions: [Write a haiku of this.]\n")
    (tmp_path / "filters.yaml").write_text("refusals: []\nsources: [dog]\nroles: []\n")
    assert copy_texts(tmp_path) == []
    options = {"texts": Texts(tmp_path), "mix": {"haiku": 1}}
    (sample,), _ = made(lambda request: "A caption.", **options)
    assert "Write a haiku of this." in sample["conversations"][0]["value"]
    assert made(lambda request: "A dog.", **options)[1].left_out == {"speaks of captions or boxes": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("form: song\nsystem: x", "haiku.yaml, form"),
        ("form: pair\nsystem: x\nsong: 1", "haiku.yaml, song: Extra inputs"),
        ("form: [", "haiku.yaml cannot be read as YAML"),
        ("form: answer\nsystem: x", "has the form `answer` and no questions"),
    ],
)
def test_a_bad_text_is_named(tmp_path, text, words):
    (tmp_path / "haiku.yaml").write_text(text)
    with pytest.raises(DataError, match=words):
        Instruct(Texts(tmp_path), mix={"haiku": 1})


def test_a_bad_pattern_is_named(tmp_path):
    (tmp_path / "filters.yaml").write_text("refusals: ['(']\nsources: []\nroles: []\n")
    with pytest.raises(DataError, match=r"filters.yaml, refusals: '\(' is no regular expression"):
        Instruct(Texts(tmp_path))
    with pytest.raises(DataError, match="make-data texts"):
        Texts(tmp_path / "none")


def test_the_packages_own_texts_are_sound():
    kinds = {"brief": Questions, "read_text": Questions, "filters": Patterns, "concepts": Concepts, "score": Judging}
    patterns = Texts().read("filters", Patterns)
    for name in Texts().names():
        prompt = Texts().read(name, kinds.get(name, Prompt))
        for example in getattr(prompt, "examples", []):
            maker = Instruct(mix={name: 1})
            record = example.record.model_copy(update={"id": "x", "image": "x.jpg"})
            assert list(maker.make([record], asker(lambda request, text=example.reply: text), Report())), name
        for question in getattr(prompt, "questions", []):
            assert not patterns.compiled["roles"].search(question)
