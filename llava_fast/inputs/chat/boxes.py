"""Boxes in text as Qwen-VL writes them: `<ref>a dog</ref><box>(112,40),(560,998)</box>`, in thousandths of the image.

Sources: Bai et al. 2023 (Qwen-VL); QwenLM/Qwen-VL aa00ed0 README.md, and eval_mm/evaluate_grounding.py, where 999 is
the right or lower edge.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llava_fast.errors import RequestError

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of the image's sides, from 0 to 1."""
EDGE = 999
_NUMBER = r"\s*(\d{1,4})\s*"
_BOX = re.compile(rf"<box>\s*\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)\s*</box>")
_TAG = re.compile("</?ref>|</?box>")
_GROUP = re.compile(
    rf"(?:<ref>(?P<label>(?:(?!{_TAG.pattern}).)*)</ref>\s*)?(?P<boxes><box>[^<]*</box>(?:\s*<box>[^<]*</box>)*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Region:
    """What a text names, "" if nothing, and its boxes."""

    label: str
    boxes: tuple[Box, ...]


def read_boxes(text: str) -> list[Region]:
    """The boxes of an answer, in order. What is not written as a box, or has a coordinate above 999, is left out; a box
    written from right to left or upwards is turned."""
    found = []
    for group in _GROUP.finditer(text):
        boxes = []
        for match in _BOX.finditer(group["boxes"]):
            left, top, right, bottom = (int(number) for number in match.groups())
            if max(left, top, right, bottom) <= EDGE:
                (left, right), (top, bottom) = sorted((left, right)), sorted((top, bottom))
                boxes.append((left / EDGE, top / EDGE, right / EDGE, bottom / EDGE))
        if boxes:
            found.append(Region((group["label"] or "").strip(), tuple(boxes)))
    return found


def write_boxes(label: str, boxes: Sequence[Box]) -> str:
    """The text of some boxes, for a prompt or an answer to train on; a `label` of "" is not written. `read_boxes` reads
    it again, to half a thousandth. Raises RequestError for a box outside the image and a label with a tag."""
    if tag := _TAG.search(label):
        raise RequestError(f"the label {label!r} has {tag[0]}, which would end it: leave the tag out")
    written = [f"<ref>{label}</ref>"] if label else []
    for box in boxes:
        left, top, right, bottom = box
        if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
            raise RequestError(f"the box {box} is not left, top, right, bottom as fractions of the image, from 0 to 1")
        left, top, right, bottom = (round(side * EDGE) for side in box)
        written.append(f"<box>({left},{top}),({right},{bottom})</box>")
    return "".join(written)
