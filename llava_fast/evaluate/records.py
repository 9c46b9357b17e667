"""Answers on disk as JSON lines, so that an interrupted evaluation can be continued.

The first line has the task, model and settings. A run with other ones is rejected. An incomplete last line is removed.
Every answer has a hash of its question (prompt and images), so that changed data is detected. Several processes may
answer shards of one task, each with its own file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.task import Answer, Question, relative
from llava_fast.storage.journal import append_whole

VERSION = 1
FIELDS = {"id", "key", *(field.name for field in dataclasses.fields(Answer))}


def file_name(task: str) -> str:
    """Convert a task name to a file name: "gqa:val" -> "gqa_val"."""
    return "".join(character if character.isalnum() or character in "-." else "_" for character in task)


def key_of(question: Question, folder: Path) -> str:
    """Hash the input of the model. Images below `folder` are hashed by relative path, so that the folder may be
    moved."""
    found = hashlib.blake2b(digest_size=12)
    said: list[Any] = [question.prompt, question.history, question.placed]
    if question.candidates:
        said.append(question.candidates)
    found.update(json.dumps(said, ensure_ascii=False).encode())
    for image in question.images:
        if isinstance(image, np.ndarray):
            found.update(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
        elif isinstance(image, bytes):
            found.update(image)
        else:
            found.update(relative(image, folder).encode())
        found.update(b"\0")
    return found.hexdigest()


class Records:
    """The answers of one task in a folder. A context manager, which locks the file that it appends to.

    settings   JSON of everything besides the questions that the answers depend on.
    shard      (index, count): append to the file of this shard. The files of all shards are read.
    """

    def __init__(
        self, folder: Path, task: str, settings: Mapping[str, Any], shard: tuple[int, int] | None = None
    ) -> None:
        self.task, self.settings, self.shard = task, dict(settings), shard
        name = file_name(task)
        self.folder, self.name = folder, name
        self.path = folder / (f"{name}.shard-{shard[0]}-of-{shard[1]}.jsonl" if shard else f"{name}.jsonl")
        self._lock = FileLock(f"{self.path}.lock")
        self._file: IO[bytes] | None = None

    def files(self) -> list[Path]:
        """Return the existing files of the task and of its shards."""
        own = self.folder / f"{self.name}.jsonl"
        return [path for path in (own, *sorted(self.folder.glob(f"{self.name}.shard-*.jsonl"))) if path.exists()]

    def __enter__(self) -> Records:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise EvaluationError(
                f"{self.path} is being written by another run: wait for it, or give another --out"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def read(self, keys: Mapping[str, str]) -> dict[str, Answer]:
        """Return the stored answers to the questions in `keys` (id -> key). Raises EvaluationError for answers of
        another model or with other settings, and for a question that has changed. A failed answer (`error`) is left
        out, so that its question is asked again: the cause may be gone (a full GPU).
        """
        found: dict[str, Answer] = {}
        for path in self.files():
            for row in self._rows(path):
                name = row.pop("id")
                if name not in keys:
                    continue  # from a run with a larger limit
                if row.pop("key") != keys[name]:
                    raise EvaluationError(
                        f"{path}: question {name!r} is not the one that was answered: the data changed, so give "
                        "another --out, or --fresh"
                    )
                if row["error"] is None:
                    found[name] = Answer(**row)
        return found

    def append(self, question: Question, key: str, answer: Answer) -> None:
        """Append an answer. The file is not buffered."""
        if self._file is None:
            _mend(self.path)
            empty = not self.path.exists() or not self.path.stat().st_size
            self._file = self.path.open("ab", buffering=0)
            if empty:
                self._write({"evaluation": VERSION, "task": self.task, "settings": self.settings})
        self._write({"id": question.id, "key": key, **dataclasses.asdict(answer)})

    def clear(self) -> None:
        """Delete all answers of the task. A shard keeps those of the other shards of its run, which may be at work."""
        beside = f"-of-{self.shard[1]}.jsonl" if self.shard is not None else None
        for path in self.files():
            if path == self.path or beside is None or not path.name.endswith(beside):
                path.unlink(missing_ok=True)

    def _write(self, value: dict[str, Any]) -> None:
        assert self._file is not None
        try:
            append_whole(self._file.fileno(), json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        except OSError as error:
            raise EvaluationError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def _rows(self, path: Path) -> Iterable[dict[str, Any]]:
        lines = path.read_bytes().split(b"\n")
        del lines[-1]  # empty, or an incomplete line
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                raise EvaluationError(f"{path}, line {number} is no JSON: remove the line, or give --fresh") from None
            if number == 1:
                self._check(path, row)
            elif isinstance(row, dict) and row.keys() == FIELDS:
                yield row
            else:
                raise EvaluationError(f"{path}, line {number} is no answer: remove the line, or give --fresh")

    def _check(self, path: Path, header: Any) -> None:
        if not isinstance(header, dict) or header.get("evaluation") != VERSION:
            raise EvaluationError(f"{path} holds no answers of this version of llava-fast eval: give another --out")
        before = header["settings"]
        for name in sorted({*before, *self.settings}):
            if before.get(name) != self.settings.get(name):
                raise EvaluationError(
                    f"{path} holds answers with {name} {before.get(name)!r}, not {self.settings.get(name)!r}: "
                    "give another --out, or --fresh to answer again"
                )


def _mend(path: Path) -> None:
    """Remove an incomplete last line of a file."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
