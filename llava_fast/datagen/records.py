"""Descriptions of images as text: captions, boxes and words, from COCO's files or from JSON lines."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llava_fast.errors import DataError
from llava_fast.train.data.files import expand, read_text, read_values

Fraction = float


class Box(BaseModel):
    """An object and its box (left, top, right, bottom), relative to the image size (0 to 1)."""

    model_config = ConfigDict(extra="ignore")

    label: str = Field(min_length=1)
    box: tuple[Fraction, Fraction, Fraction, Fraction]

    @field_validator("box")
    @classmethod
    def _within(cls, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        left, top, right, bottom = box
        if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
            raise ValueError("it must be left, top, right, bottom as fractions of the picture's sides, from 0 to 1")
        return box


class Record(BaseModel):
    """An image or video and its description. Other keys are ignored.

    id       generated from the position in the file if missing.
    image    a path, or several, relative to the folder of images; or `video`.
    captions texts; a key "caption" with one text is accepted too.
    words    texts in the image, in reading order.
    """

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    id: str = ""
    image: str | list[str] | None = None
    video: str | None = None
    captions: list[str] = []
    boxes: list[Box] = []
    words: list[str] = []

    def media(self) -> dict[str, Any]:
        """Return the key "image" or "video" of a sample."""
        return {name: value for name in ("image", "video") if (value := getattr(self, name)) is not None}

    def placeholders(self) -> str:
        """Return a line with <image> for each image, or with <video>."""
        if self.video is not None:
            return "<video>\n"
        count = len(self.image) if isinstance(self.image, list) else int(self.image is not None)
        return "<image>\n" * count

    def context(self) -> str:
        """Return the description that a language model gets instead of the image."""
        parts = []
        if self.captions:
            parts.append("Captions:\n" + "\n".join(f"- {caption.strip()}" for caption in self.captions))
        if self.boxes:
            lines = [f"{each.label}: " + ", ".join(f"{value:.3f}" for value in each.box) for each in self.boxes]
            parts.append("Objects (left, top, right, bottom):\n" + "\n".join(lines))
        if self.words:
            parts.append("Text in the picture:\n" + "\n".join(self.words))
        return "\n\n".join(parts)


def read_records(paths: Iterable[str]) -> list[Record]:
    """Read records from JSON lists or JSON lines (globs allowed). Raises DataError, which names file, record and
    field."""
    return [
        read_record(value, f"{file}, record {number}", f"{Path(file).stem}-{number}")
        for path in paths
        for file in expand(path)
        for number, value in enumerate(read_values(file))
    ]


def read_record(value: Any, where: str, name: str = "") -> Record:
    """Validate one record. Raises DataError."""
    if not isinstance(value, dict):
        raise DataError(f"{where} is no object: a record is {{'image': path, 'captions': [text, ...]}}")
    if "captions" not in value and isinstance(value.get("caption"), str):
        value = {**value, "captions": [value["caption"]]}
    try:
        record = Record.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where}, {field}: {first['msg'].removeprefix('Value error, ')}") from None
    return record if record.id else record.model_copy(update={"id": name})


def read_coco(captions: Sequence[str], instances: Sequence[str] = (), prefix: str = "") -> list[Record]:
    """Read records from COCO's captions_*.json and instances_*.json. `prefix` is prepended to each file name.

    Images without a caption are omitted. Raises DataError, which names file and field.
    """
    images: dict[int, dict[str, Any]] = {}
    texts: dict[int, list[str]] = defaultdict(list)
    boxes: dict[int, list[Box]] = defaultdict(list)
    for path in captions:
        content = _coco(path, "images", "annotations")
        images.update((each["id"], each) for each in _each(content["images"], f"{path}, images", "id", "file_name"))
        for each in _each(content["annotations"], f"{path}, annotations", "image_id", "caption"):
            texts[each["image_id"]].append(" ".join(str(each["caption"]).split()))
    for path in instances:
        content = _coco(path, "images", "annotations", "categories")
        names = {each["id"]: each["name"] for each in _each(content["categories"], f"{path}, categories", "id", "name")}
        sizes = {
            each["id"]: (each["width"], each["height"])
            for each in _each(content["images"], f"{path}, images", "id", "width", "height")
        }
        where = f"{path}, annotations"
        for each in _each(content["annotations"], where, "image_id", "category_id", "bbox"):
            if each["image_id"] not in sizes or each["category_id"] not in names:
                raise DataError(f"{where}: {each['image_id']} or category {each['category_id']} is not in the file")
            boxes[each["image_id"]].append(
                _box(names[each["category_id"]], each["bbox"], sizes[each["image_id"]], where)
            )
    if not texts:
        raise DataError(f"{', '.join(captions)}: no caption in it")
    return [
        Record(id=str(number), image=prefix + image["file_name"], captions=texts[number], boxes=boxes.get(number, []))
        for number, image in images.items()
        if number in texts
    ]


def _coco(path: str, *fields: str) -> dict[str, Any]:
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    for field in fields:
        if not isinstance(content, dict) or not isinstance(content.get(field), list):
            raise DataError(f"{path} has no list {field!r}: it is no COCO file of this kind")
    return content


def _each(values: list[Any], where: str, *fields: str) -> Iterator[dict[str, Any]]:
    for number, value in enumerate(values):
        missing = [field for field in fields if not isinstance(value, dict) or field not in value]
        if missing:
            raise DataError(f"{where}[{number}] has no {missing[0]!r}")
        yield value


def _box(label: str, given: Any, size: tuple[float, float], where: str) -> Box:
    """Convert COCO's left, top, width and height in pixels. Values slightly outside the image are clamped."""
    try:
        left, top, width, height = (float(value) for value in given)
        right, bottom = (left + width) / size[0], (top + height) / size[1]
        left, top = left / size[0], top / size[1]
    except (TypeError, ValueError, ZeroDivisionError):
        raise DataError(f"{where}: {given!r} in a picture of {size} is no box: left, top, width, height") from None
    left, top, right, bottom = (min(max(value, 0.0), 1.0) for value in (left, top, right, bottom))
    return Box.model_construct(label=label, box=(left, top, max(left, right), max(top, bottom)))
