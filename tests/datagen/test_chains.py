"""Samples in the context of related ones."""

import json

import numpy as np
import pytest
from PIL import Image

from llava_fast.datagen import chains, similarity
from llava_fast.datagen.output import Report
from llava_fast.datagen.records import Record
from llava_fast.datagen.samples import Given, read_given
from llava_fast.errors import DataError
from llava_fast.train.data.samples import Source, read_sources
from tests.support import tiny


def given(name, *pairs, **media):
    return Given({"id": name, **(media or {"image": f"{name}.jpg"})}, "data.json", pairs)


def trained(samples, tmp_path):
    """The samples as training reads them."""
    (tmp_path / "chains.json").write_text(json.dumps(samples))
    table = read_sources([Source(path=str(tmp_path / "chains.json"))])
    return [table[number].request for number in range(len(table))]


SAMPLES = [
    given("a", ("Which animal runs?", "A brown dog runs.")),
    given("b", ("What is on the table?", "A bowl of apples is on the table."), ("And?", "A spoon.")),
    given("c", ("Which animal sleeps?", "A brown dog sleeps.")),
    given("d", ("What fruit is there?", "Green apples in a bowl.")),
]


def nearest_texts(samples, count=1):
    return similarity.nearest(
        similarity.text_vectors([each.text for each in samples]), count, [s.media for s in samples]
    )


def test_related_texts_come_first(tmp_path):
    near = nearest_texts(SAMPLES)
    assert near == [[2], [3], [0], [1]]
    report = Report()
    made = list(chains.chains(SAMPLES, near, report))
    assert made[1]["image"] == ["d.jpg", "b.jpg"]
    assert [turn["value"] for turn in made[1]["conversations"]] == [
        "<image>\nWhat fruit is there?",
        "Green apples in a bowl.",
        "<image>\nWhat is on the table?",
        "A bowl of apples is on the table.",
        "And?",
        "A spoon.",
    ]
    assert report.made == {"1 in context": 4}
    assert [len(request["images"]) for request in trained(made, tmp_path)] == [2] * 4


def test_the_same_picture_is_no_context_and_the_search_is_the_same_for_many():
    twins = [
        given("a", ("q", "red apple")),
        given("b", ("q", "red apple"), image="a.jpg"),
        given("c", ("q", "red pear")),
    ]
    assert nearest_texts(twins, 2) == [[2], [2], [0]]
    many = [given(str(n), ("q", f"word{n // 2}")) for n in range(60)]
    assert nearest_texts(many) == [[n ^ 1] for n in range(60)]
    assert nearest_texts([given("a", ("the", "of")), given("b", ("the", "of"))]) == [[], []]


def test_about_the_same_video(tmp_path):
    samples = [given(str(n), (f"Question {n}?", f"Answer {n}."), video="v.mp4") for n in range(3)]
    samples.append(given("x", ("Question?", "Answer."), video="w.mp4"))
    report = Report()
    made = list(chains.chains(samples, chains.same_media(samples, 1), report))
    assert [turn["value"] for turn in made[0]["conversations"]] == [
        "<video>\nQuestion 1?",
        "Answer 1.",
        "Question 0?",
        "Answer 0.",
    ]
    assert (len(made), report.left_out) == (3, {"nothing related": 1})
    assert trained(made, tmp_path)[0]["video"].endswith("v.mp4")


def test_what_no_chain_is_made_of():
    report = Report()
    samples = [
        given("a", ("q", "a"), text=""),
        given("b", ("q", "a"), video="v"),
        given("c", ("q", "a"), image=["a", "b"]),
    ]
    assert chains.usable(samples, "text", report) == []
    assert sum(report.left_out.values()) == 3
    assert chains.usable(samples, "media", Report()) == samples[1:]


def test_pictures_that_look_alike(tmp_path):
    model = tiny.pair("next").ours
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (2, 60, 60, 3), dtype=np.uint8)
    for number in range(4):
        Image.fromarray(texture[number % 2] // (1 + number // 2)).save(tmp_path / f"{number}.png")
    vectors = similarity.image_vectors(model, [str(tmp_path / f"{n}.png") for n in range(4)])
    assert vectors.shape == (4, model.config.decoder.hidden_size)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alone = similarity.image_vectors(model, [str(tmp_path / "3.png")])
    assert np.allclose(alone[0], vectors[3], atol=1e-4)
    assert similarity.nearest(np.array([[1, 0], [0, 1], [1, 0.1], [0.1, 1]]), 1, range(4)) == [[2], [3], [0], [1]]


def test_two_records_are_told_together():
    records = [Record(id=str(n), image=f"{n}.jpg", captions=[f"Cat {n}."]) for n in range(3)]
    made = chains.two_pictures(records, [[1], [0], [1]])
    assert [each.image for each in made] == [["0.jpg", "1.jpg"], ["1.jpg", "2.jpg"]]
    assert made[0].context() == "First picture\nCaptions:\n- Cat 0.\n\nSecond picture\nCaptions:\n- Cat 1."
    assert made[0].placeholders() == "<image>\n<image>\n"


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"id": 1}, r"d.json\[0\] has no conversations"),
        ({"conversations": [{"from": "human", "value": 3}]}, "has a turn that is not"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "not 'human' and 'gpt' by turns"),
        ({"image": 3, "conversations": []}, "image must be a path"),
    ],
)
def test_a_bad_sample_is_named(tmp_path, sample, words):
    (tmp_path / "d.json").write_text(json.dumps([sample]))
    with pytest.raises(DataError, match=words):
        read_given([str(tmp_path / "d.json")])
