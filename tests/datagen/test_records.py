"""Records from JSON lines and from COCO's files."""

import json

import pytest

from llava_fast.datagen.records import Record, read_coco, read_records
from llava_fast.errors import DataError


def written(path, content, lines=False):
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))
    return str(path)


def test_a_record_is_read_and_shown(tmp_path):
    given = {
        "image": "a.jpg",
        "caption": "A cat.",
        "boxes": [{"label": "cat", "box": [0, 0.25, 0.5, 1]}],
        "words": ["HI"],
    }
    (record,) = read_records([written(tmp_path / "r.jsonl", [given], lines=True)])
    assert record.id == "r-0"
    assert record.context() == (
        "Captions:\n- A cat.\n\nObjects (left, top, right, bottom):\ncat: 0.000, 0.250, 0.500, 1.000\n\n"
        "Text in the picture:\nHI"
    )
    assert (record.media(), record.placeholders()) == ({"image": "a.jpg"}, "<image>\n")
    assert Record(video="v.mp4").placeholders() == "<video>\n"
    assert Record(image=["a", "b"]).placeholders() == "<image>\n<image>\n"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (3, "record 0 is no object"),
        ({"captions": "one"}, "record 0, captions"),
        ({"boxes": [{"label": "cat", "box": [0, 0, 30, 40]}]}, r"record 0, boxes.0.box: it must be left, top"),
        ({"boxes": [{"label": "cat", "box": [0.5, 0, 0.4, 1]}]}, "boxes.0.box"),
        ({"image": {"a": 1}}, "record 0, image"),
    ],
)
def test_a_bad_record_is_named(tmp_path, record, words):
    with pytest.raises(DataError, match=words):
        read_records([written(tmp_path / "r.json", [record])])


CAPTIONS = {
    "images": [
        {"id": 7, "file_name": "7.jpg", "width": 200, "height": 100},
        {"id": 8, "file_name": "8.jpg", "width": 10, "height": 10},
    ],
    "annotations": [{"image_id": 7, "caption": "A cat \n sits. "}, {"image_id": 7, "caption": "Cat."}],
}
INSTANCES = {
    "images": CAPTIONS["images"],
    "annotations": [{"image_id": 7, "category_id": 1, "bbox": [50, 25, 100, 80]}],
    "categories": [{"id": 1, "name": "cat"}],
}


def test_cocos_boxes_become_fractions(tmp_path):
    files = written(tmp_path / "c.json", CAPTIONS), written(tmp_path / "i.json", INSTANCES)
    (record,) = read_coco([files[0]], [files[1]], "train/")
    assert (record.id, record.image, record.captions) == ("7", "train/7.jpg", ["A cat sits.", "Cat."])
    assert record.boxes[0].label == "cat"
    assert record.boxes[0].box == (0.25, 0.25, 0.75, 1.0)  # 1.05 is cut at the edge
    assert read_coco([files[0]])[0].boxes == []


@pytest.mark.parametrize(
    ("captions", "instances", "words"),
    [
        ({}, INSTANCES, "has no list 'images'"),
        ({**CAPTIONS, "annotations": [{"image_id": 7}]}, INSTANCES, r"annotations\[0\] has no 'caption'"),
        ({**CAPTIONS, "annotations": []}, INSTANCES, "no caption in it"),
        (CAPTIONS, {**INSTANCES, "categories": []}, "category 1 is not in the file"),
        (CAPTIONS, {**INSTANCES, "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1]}]}, "is no box"),
    ],
)
def test_a_bad_coco_file_is_named(tmp_path, captions, instances, words):
    files = written(tmp_path / "c.json", captions), written(tmp_path / "i.json", instances)
    with pytest.raises(DataError, match=words):
        read_coco([files[0]], [files[1]])
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        read_coco([files[0]])
