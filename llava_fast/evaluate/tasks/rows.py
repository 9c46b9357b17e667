"""Published files as rows whose fields are checked: an error names the file, the row and the field."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_fast.errors import DataError, EvaluationError
from llava_fast.evaluate.task import DataFile
from llava_fast.train.data.files import read_text, read_values


class Row:
    """An object of a data file. `where` is what errors call it, as "val.json[12]"."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise EvaluationError(f"{where} is {_shown(value)}, not an object with fields")
        self.value, self.where = value, where

    def get(self, name: str, default: Any = None) -> Any:
        return self.value.get(name, default)

    def any(self, *names: str) -> Any:
        """The first of these fields that is there. Raises EvaluationError if none is."""
        for name in names:
            if self.value.get(name) is not None:
                return self.value[name]
        raise EvaluationError(f"{self.where} has no {' or '.join(map(repr, names))}")

    def text(self, *names: str) -> str:
        found = self.any(*names)
        if not isinstance(found, str):
            raise EvaluationError(f"{self.where}: {names[0]!r} is {_shown(found)}, not a text")
        return found

    def id(self, *names: str) -> str:
        """A number or text, as text."""
        found = self.any(*names)
        if isinstance(found, bool) or not isinstance(found, (str, int)):
            raise EvaluationError(f"{self.where}: {names[0]!r} is {_shown(found)}, not a number or a text")
        return str(found)

    def number(self, name: str) -> str:
        """A whole number, or its digits, as text: the id that a submission gives as a number."""
        found = self.id(name)
        if not (found.isascii() and found.isdecimal()):
            raise EvaluationError(f"{self.where}: {name!r} is {_shown(found)}, not a whole number")
        return str(int(found))

    def whole(self, name: str) -> int:
        found = self.any(name)
        if isinstance(found, bool) or not isinstance(found, int):
            raise EvaluationError(f"{self.where}: {name!r} is {_shown(found)}, not a whole number")
        return found

    def texts(self, name: str) -> list[str]:
        found = self.any(name)
        if not isinstance(found, list) or not found or not all(isinstance(each, str) for each in found):
            raise EvaluationError(f"{self.where}: {name!r} is {_shown(found)}, not a list of texts")
        return found

    def rows(self, name: str) -> list[Row]:
        found = self.any(name)
        if not isinstance(found, list):
            raise EvaluationError(f"{self.where}: {name!r} is {_shown(found)}, not a list")
        return [Row(each, f"{self.where}: {name}[{number}]") for number, each in enumerate(found)]

    def row(self, name: str) -> Row:
        return Row(self.any(name), f"{self.where}: {name}")

    def object(self, name: str) -> dict[str, Any]:
        found = self.any(name)
        if not isinstance(found, dict):
            raise EvaluationError(f"{self.where}: {name!r} is {_shown(found)}, not an object")
        return found


def find(folder: Path, file: DataFile, task: str) -> Path:
    """The file or folder of a task's data. Raises EvaluationError, naming it and what it is."""
    for path in (file.path, *file.instead):
        if (folder / path).exists():
            return folder / path
    names = " or ".join((file.path, *file.instead))
    raise EvaluationError(f"{task} needs {names} ({file.what}) in {folder}: `llava-fast eval --tasks` says whence")


def text_of(path: Path) -> str:
    """The text of a file in UTF-8."""
    try:
        return read_text(str(path))
    except DataError as error:
        raise EvaluationError(str(error)) from None


def read_object(path: Path) -> Row:
    """A file that holds one JSON object."""
    try:
        return Row(json.loads(text_of(path)), path.name)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path}, line {error.lineno}: invalid JSON: {error.msg}") from None


def read_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON list or of JSON lines. (POPE's .json files hold JSON lines.)"""
    try:
        for number, value in enumerate(read_values(str(path))):
            yield Row(value, f"{path.name}[{number}]")
    except DataError as error:
        raise EvaluationError(str(error)) from None


def read_table(path: Path) -> Iterator[Row]:
    """The lines of a tab-separated file with a header."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a field may hold a picture
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for number, value in enumerate(csv.DictReader(file, delimiter="\t")):
                yield Row({name: field for name, field in value.items() if field}, f"{path.name}, line {number + 2}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise EvaluationError(f"{path} is no tab-separated table in UTF-8: {error}") from None


def once(ids: dict[str, Any], name: str, where: str) -> None:
    """Raises EvaluationError for an id that another row has too."""
    if name in ids:
        raise EvaluationError(f"{where} has the id {name!r} of an earlier row")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
