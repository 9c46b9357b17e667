"""Image-text pairs by noun-phrase coverage."""

import pytest

from llava_fast.datagen import pretrain
from llava_fast.datagen.nouns import normal, noun_phrases
from llava_fast.datagen.output import Report
from llava_fast.datagen.records import Record
from llava_fast.datagen.wording import Questions, Texts
from llava_fast.errors import DataError


def by_spaces(captions):
    return [caption.split() for caption in captions]


def too_few(captions):
    return []


def test_rare_phrases_are_left_out_and_common_ones_capped():
    phrases = [["rare"]] * 2 + [["some"]] * 3 + [["many"]] * 150
    chosen = pretrain.choose(phrases)
    assert [number for number in chosen if number < 5] == [2, 3, 4]
    assert len(chosen) == 3 + 100
    assert chosen == pretrain.choose(phrases)
    assert chosen != pretrain.choose(phrases, seed=1)


def test_a_caption_of_several_phrases_is_chosen_by_any():
    phrases = [["a", "b"], ["a"], ["a"], ["b"], ["b"], ["c"]]
    assert pretrain.choose(phrases, least=3, most=3) == [0, 1, 2, 3, 4]
    chosen = pretrain.choose(phrases, least=3, most=1)
    assert 1 <= len(chosen) <= 2


def test_pairs_have_brief_instructions_of_the_list():
    records = [Record(id=str(n), image=f"{n}.jpg", captions=[f" Caption {n}. "]) for n in range(60)]
    report = Report()
    samples = list(pretrain.pairs(records, range(60), Texts().read("brief", Questions), report))
    questions = {sample["conversations"][0]["value"].replace("<image>", "").strip() for sample in samples}
    assert questions == set(Texts().read("brief", Questions).questions)
    assert samples[7]["conversations"][1] == {"from": "gpt", "value": "Caption 7."}
    assert report.made == {"pairs": 60}


def test_records_that_cannot_be_used_are_counted():
    report = Report()
    records = [Record(captions=["A."]), Record(image="a.jpg"), Record(image="b.jpg", captions=["B."])]
    assert pretrain.usable(records, report) == records[2:]
    assert report.left_out == {"no picture": 1, "no caption": 1}
    with pytest.raises(DataError, match="no record has a picture"):
        pretrain.usable(records[:2], Report())


def test_phrases_of_textblob():
    found = list(
        noun_phrases(["A man riding a red motorcycle on the dirt road.", "sitting", "two dogs/cats"], "textblob")
    )
    assert found == [["man", "red motorcycle", "dirt road"], [], ["two dogs", "cats"]]


def test_phrases_are_normal_and_distinct():
    assert normal(" The  Red Car.") == "red car"
    assert list(noun_phrases(["Cat the-cat CAT dog"], f"{__name__}:by_spaces")) == [["cat", "the-cat", "dog"]]


def test_phrases_by_processes():
    captions = [f"cat {n}" for n in range(4500)]
    assert list(noun_phrases(captions, f"{__name__}:by_spaces", 2)) == [["cat", str(n)] for n in range(4500)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nltk", "neither built in nor a function of yours"),
        ("none:tag", "cannot be imported"),
        (f"{__name__}:__name__", "is no function"),
        (f"{__name__}:too_few", "gave phrases for 0 of 1 captions"),
        ("spacy:en_core_web_sm", "spaCy|spacy"),
    ],
)
def test_a_tagger_that_is_not_there(name, words):
    with pytest.raises(DataError, match=words):
        list(noun_phrases(["A cat."], name))
