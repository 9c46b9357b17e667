"""A core set in the manner of SVIT's."""

from llava_fast.datagen import core_set
from llava_fast.datagen.output import Report
from llava_fast.datagen.samples import Given

CONCEPTS = {"colour": ["red", "Green"], "position": ["left", "in front of"], "rare": ["violet"]}


def given(answer, source="a.json", question="What?"):
    return Given({}, source, ((question, answer),))


def test_the_most_informative_samples():
    samples = [
        given("A red car."),
        given("A red car left of a green tree."),
        given("Redder."),
        given("RED, in front of it"),
    ]
    report = Report()
    assert core_set.choose(samples, CONCEPTS, 2, report) == [1, 3]
    assert report.left_out == {"less informative": 2}
    assert report.notes["mean score"] == "2.50 of all 1.50"
    assert report.notes["manner"].startswith("in the manner of SVIT's core set")


def test_a_word_counts_once_and_rare_ones_not():
    samples = [given("red red red"), given("red left"), given("violet red left"), given("left red")]
    assert core_set.choose(samples, CONCEPTS, 3, Report(), least=2) == [1, 2, 3]
    assert core_set.choose(samples, CONCEPTS, 1, Report()) == [2]


def test_equal_samples_are_drawn_by_the_seed():
    samples = [given("red")] * 50
    chosen = [core_set.choose(samples, CONCEPTS, 10, Report(), seed=seed) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_caps_of_sources():
    samples = [given("red left", "data/gqa.json")] * 5 + [given("red", "data/vg.json")] * 5
    report = Report()
    assert core_set.choose(samples, CONCEPTS, 10, report, caps={"gqa": 2}, balance=False)[2:] == [5, 6, 7, 8, 9]
    assert report.left_out["beyond the cap of gqa"] == 3


def test_yes_and_no_are_balanced():
    yes = [given(f"Yes, red. {word}") for word in ("left", "left", "", "")]
    samples = [*yes, given("No, red left."), given("red"), given(""), given("No.")]
    report = Report()
    chosen = core_set.choose(samples, CONCEPTS, 5, report)
    assert len(chosen) == 4
    assert {4, 5, 6} < set(chosen)
    leans = [core_set._lean(samples[number]) for number in chosen]
    assert sum(leans) == 0
    assert report.left_out["more yes than no"] > 0
    assert report.made["core set"] + report.left_out.total() == len(samples)
    unbalanced = core_set.choose(samples, CONCEPTS, 5, Report(), balance=False)
    assert sum(core_set._lean(samples[number]) for number in unbalanced) != 0


def test_what_yes_and_no_are():
    leans = {"Yes.": 1, "no, it is": -1, "Nothing": 0, "Yesterday": 0, "**Yes**": 1, "It says no": 0}
    assert [core_set._lean(given(text)) for text in leans] == list(leans.values())
