"""Text in pictures as samples."""

import shutil

import pytest
from PIL import Image, ImageDraw, ImageFont

from llava_fast.datagen import ocr
from llava_fast.datagen.ocr import Word, reading_order
from llava_fast.datagen.output import Report
from llava_fast.datagen.wording import Questions, Texts
from llava_fast.errors import DataError
from llava_fast.storage.journal import Journal

ASKED = []


def by_name(path):
    ASKED.append(path)
    if "broken" in path:
        raise OSError("no image")
    return [Word("sure", (50, 0, 60, 10), 0.9), Word("Quite", (0, 1, 40, 11), 0.8), Word("guess", (0, 50, 9, 60), 0.2)]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "deep/b.jpg", "broken.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "pictures" / "notes.txt").write_text("")
    ASKED.clear()
    return tmp_path / "pictures"


def test_words_in_reading_order():
    words = [
        Word("right", (60, 2, 90, 12), 1),
        Word("below", (0, 30, 40, 42), 1),
        Word("left", (0, 0, 50, 14), 1),
        Word("slanted", (50, 24, 90, 38), 1),
    ]
    assert [word.text for word in reading_order(words)] == ["left", "right", "below", "slanted"]
    assert reading_order([]) == []


def test_pictures_are_found_below(folder, tmp_path):
    assert ocr.pictures(folder) == ["a.png", "broken.png", "deep/b.jpg"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no picture"):
        ocr.pictures(tmp_path / "none")


def test_words_are_read_once_and_broken_pictures_named(folder, tmp_path, capsys):
    images = ocr.pictures(folder)
    for _ in range(2):
        with Journal(tmp_path / "words.jsonl") as journal:
            records = list(ocr.read_words(images, folder, f"{__name__}:by_name", journal))
        assert [record.words for record in records] == [["Quite", "sure"], [], ["Quite", "sure"]]
    assert len(ASKED) == 3 + 1  # the broken one again
    assert "broken.png: OSError: no image" in "".join(capsys.readouterr())


def test_changed_pictures_and_those_of_another_folder_are_read_anew(folder, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy2(folder / "a.png", tmp_path / "other")

    def read(where):
        with Journal(tmp_path / "words.jsonl") as journal:
            list(ocr.read_words(["a.png"], where, f"{__name__}:by_name", journal))
        return len(ASKED)

    assert [read(each) for each in (folder, tmp_path / "other", folder)] == [1, 2, 2]
    (folder / "a.png").write_bytes(b"more")
    assert [read(folder), read(folder)] == [3, 3]


def test_samples_and_what_is_left_out():
    def record(name, *words):
        return ocr.Record(id=name, image=name, words=list(words))

    records = [record("a", "Good", "Morning All"), record("b"), record("c", "One"), record("d", "good", "morning all")]
    report, questions = Report(), Texts().read("read_text", Questions)
    (sample,) = ocr.samples(records, questions, report)
    assert sample["conversations"][1]["value"] == "Good\nMorning All"
    assert sample["conversations"][0]["value"].removeprefix("<image>\n") in questions.questions
    assert report.left_out == {"no text": 1, "fewer than 3 words": 1, "duplicate": 1}


def test_rapidocr_reads(tmp_path):
    pytest.importorskip("rapidocr")
    picture = Image.new("RGB", (420, 160), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((20, 20), "SUMMER CONCERT", "black", ImageFont.load_default(36))
    draw.text((20, 90), "Free entry", "black", ImageFont.load_default(36))
    picture.save(tmp_path / "poster.png")
    with Journal(tmp_path / "words.jsonl") as journal:
        (record,) = ocr.read_words(["poster.png"], tmp_path, "rapidocr", journal)
    assert [word.upper().replace(" ", "") for word in record.words] == ["SUMMERCONCERT", "FREEENTRY"]
