"""The texts that data is made with: system prompts, examples, lists of instructions, filters. A user may change all.

They are YAML files in datagen/texts. A folder given with --texts is looked into first, so a user copies out those that
are to change (`llava-fast make-data texts FOLDER`), or adds a kind of his own.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llava_fast.datagen.records import Record
from llava_fast.errors import DataError
from llava_fast.storage.files import file_written_whole

FOLDER = Path(__file__).parent / "texts"

Kind = TypeVar("Kind", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Example(_Strict):
    """A record as its user message, and the reply to it."""

    record: Record
    reply: str


class Prompt(_Strict):
    """How an endpoint is asked for one kind of sample.

    form       what the reply holds: "conversation" (several "Question:" and "Answer:"), "pair" (one of each), or
               "answer" (a text; the question is drawn from `questions`).
    needs      fields of a record without which it is not used for this kind.
    questions  for the form "answer".
    options    of the request: temperature, max_tokens, ...
    may_repeat whether different pictures may have the same text, as short answers do. Otherwise it is a duplicate.
    """

    form: Literal["conversation", "pair", "answer"]
    system: str = Field(min_length=1)
    needs: list[Literal["captions", "boxes", "words"]] = []
    examples: list[Example] = []
    questions: list[str] = []
    options: dict[str, Any] = {}
    may_repeat: bool = False

    def messages(self, user: str) -> list[dict[str, str]]:
        """The chat that asks about one user message."""
        shown = [
            {"role": role, "content": text}
            for example in self.examples
            for role, text in (("user", example.record.context()), ("assistant", example.reply.strip()))
        ]
        return [{"role": "system", "content": self.system.strip()}, *shown, {"role": "user", "content": user}]


class Judging(_Strict):
    """How an endpoint is asked to score an answer: `user` holds {context}, {question} and {answer}; `score` is the
    pattern whose first group is the number, from `least` to `most`; answers are good from `good` on. A reply in which
    the pattern does not match exactly once, or matches without a number, has no score."""

    system: str
    user: str
    score: str
    least: float
    most: float
    good: float
    options: dict[str, Any] = {}

    @field_validator("score")
    @classmethod
    def _finds_a_number(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"it is no regular expression: {error}") from None
        if not groups:
            raise ValueError("it needs a group (...) around the number")
        return pattern


class Questions(_Strict):
    """A list to draw a question from."""

    questions: list[str] = Field(min_length=1)


class Patterns(_Strict):
    """Regular expressions, matched without regard to case, of texts that are not to be trained on.

    refusals  of answers.
    sources   of questions and answers: they speak of the captions or boxes in place of the picture.
    roles     of both: names of speakers, placeholders and control tokens.
    """

    refusals: list[str]
    sources: list[str]
    roles: list[str]

    @field_validator("*")
    @classmethod
    def _compiles(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns

    @cached_property
    def compiled(self) -> dict[str, re.Pattern[str]]:
        never = r"(?!)"
        fields = {"refusals": self.refusals, "sources": self.sources, "roles": self.roles}
        return {
            name: re.compile("|".join(each) or never, re.IGNORECASE | re.MULTILINE) for name, each in fields.items()
        }


class Concepts(_Strict):
    """The concept list of a core set: words by concept."""

    concepts: dict[str, list[str]] = Field(min_length=1)


class Texts:
    """The texts of a run: those in `folder`, and the package's own for what is not there."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise DataError(f"there is no folder of texts {folder}: `llava-fast make-data texts {folder}` makes one")
        self.folder = folder

    def read(self, name: str, kind: type[Kind]) -> Kind:
        """The file NAME.yaml, as a `kind`. Raises DataError, which names file and field."""
        for folder in (self.folder, FOLDER):
            if folder is not None and (path := folder / f"{name}.yaml").is_file():
                return _read(path, kind)
        raise DataError(f"there is no {name}.yaml among the texts; there are {', '.join(self.names())}")

    def names(self) -> list[str]:
        folders = [FOLDER, *([self.folder] if self.folder else [])]
        return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def _read(path: Path, kind: type[Kind]) -> Kind:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}, {field}: {first['msg'].removeprefix('Value error, ')}") from None


def copy_texts(folder: Path) -> list[Path]:
    """Copy the package's texts to `folder`, over none that is there; returns the files written. Raises DataError."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(FOLDER.glob("*.yaml")):
            if (new := folder / path.name).exists():
                continue
            with file_written_whole(new) as part:  # a file cut short would stay at the next call
                part.write_bytes(path.read_bytes())
            written.append(new)
    except OSError as error:
        raise DataError(f"the texts cannot be copied to the folder {folder}: {error.strerror or error}") from None
    return written
