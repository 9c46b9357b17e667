"""Existing training data, read as its samples: LLaVA-format files with all keys, and the folder of their pictures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llava_fast.errors import DataError
from llava_fast.train.data.files import expand, read_values

PLACEHOLDERS = ("<image>", "<video>")


@dataclass(frozen=True)
class Given:
    """A sample of a LLaVA-format file.

    value    the object in the file.
    source   the file.
    pairs    its questions, without placeholders, and their answers.
    """

    value: dict[str, Any]
    source: str
    pairs: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return str(self.value.get("id", ""))

    @property
    def images(self) -> list[str]:
        image = self.value.get("image") or []
        return [image] if isinstance(image, str) else list(image)

    @property
    def video(self) -> str:
        return self.value.get("video") or ""

    @property
    def media(self) -> tuple[str, ...]:
        """What is looked at; () for a sample of text."""
        return (self.video,) if self.video else tuple(self.images)

    @property
    def text(self) -> str:
        return "\n".join(text for pair in self.pairs for text in pair)


def read_given(paths: Iterable[str]) -> list[Given]:
    """The samples of files (globs too). Raises DataError, naming file and sample, for one without whole turns."""
    samples = []
    for path in paths:
        for file in expand(path):
            for number, value in enumerate(read_values(file)):
                where = f"{os.path.basename(file)}[{number}]"
                samples.append(Given(value, file, _pairs(value, where)))
    if not samples:
        raise DataError(f"{', '.join(paths)}: no sample in it")
    return samples


def _pairs(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    turns = value.get("conversations") if isinstance(value, dict) else None
    if not isinstance(turns, list):
        raise DataError(f"{where} has no conversations: it needs a list of turns, {{'from', 'value'}}")
    image = value.get("image")
    if not isinstance(image, (str, list, type(None))) or not isinstance(value.get("video"), (str, type(None))):
        raise DataError(f"{where}: image must be a path or a list of paths, and video a path")
    said = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(f"{where} has a turn that is not {{'from': 'human' or 'gpt', 'value': text}}")
        if turn.get("from") != "system":
            said.append((turn.get("from"), _without_placeholders(turn["value"])))
    speakers = [speaker for speaker, _ in said]
    if not said or speakers != ["human", "gpt"] * (len(said) // 2):
        raise DataError(f"{where}: its turns are not 'human' and 'gpt' by turns, to an answer")
    texts = [text for _, text in said]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _without_placeholders(text: str) -> str:
    for placeholder in PLACEHOLDERS:
        text = text.replace(placeholder, "")
    return text.strip()
