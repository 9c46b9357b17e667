"""A checkpoint's small files: text of bounded size, JSON objects validated by a pydantic model, and atomically written
directories.

This module does not interpret the files. Every reading function raises CheckpointError with one line that names the
file and the field.
"""

from __future__ import annotations

import contextlib
import json
import os
import reprlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from llava_fast.errors import CheckpointError

MOST_BYTES = 64 * 2**20
"""The largest side file that is read. The largest of published models are tokenizer vocabularies, below 40 MB."""
MOST_NESTED = 64
"""Maximum nesting depth of lists and objects in a JSON file."""


class Fields(BaseModel):
    """Base class of JSON schemas: strict types, finite numbers; unknown fields are allowed and ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


def one_line(problem: BaseException) -> str:
    """The message of another library's exception, on one line."""
    return " ".join(str(problem).split())


def check_regular(file: Path) -> None:
    """Raise CheckpointError unless `file` is a regular file or a link to one: opening a FIFO would block for ever."""
    try:
        if file.is_file():
            return
        there = file.exists() or file.is_symlink()
    except OSError as problem:  # for example a name that is too long
        raise CheckpointError(f"{file} cannot be read ({problem.strerror})") from None
    if there:
        raise CheckpointError(f"{file} is not a regular file; replace it with the checkpoint's file")
    raise CheckpointError(f"{file.parent} has no {file.name}: it is not a LLaVA checkpoint")


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark and with lines ending in "\\n"."""
    check_regular(file)
    try:
        if (size := file.stat().st_size) > MOST_BYTES:
            raise CheckpointError(f"{file} has {size} bytes, above the limit of {MOST_BYTES} for such a file")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise CheckpointError(f"{file} is not UTF-8 ({problem}); save it in that encoding") from None
    except OSError as problem:
        raise CheckpointError(f"{file} cannot be read ({problem.strerror or problem})") from None


def read_json(file: Path, fields: type[Fields] | None = None) -> dict[str, Any]:
    """The JSON object in `file`, unchanged, after validation by `fields`."""
    content = parse_json(read_text(file), file)
    if fields is not None:
        check_fields(content, fields, file)
    return content


def read_json_if_there(file: Path, fields: type[Fields] | None = None) -> dict[str, Any]:
    """Like `read_json`, but {} for an absent file."""
    return read_json(file, fields) if os.path.lexists(file) else {}  # a broken link is an error, not absent


def parse_json(text: str, file: Path) -> dict[str, Any]:
    """The JSON object in `text`, the content of `file`."""
    try:
        content = json.loads(text)
    except RecursionError:
        _refuse_nesting(file)
    except ValueError as problem:
        raise CheckpointError(f"{file} cannot be read as JSON ({problem}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a JSON {type(content).__name__}, not an object")
    _check_values(content, file, escapes="\\u" in text)
    return content


def check_fields(content: Mapping[str, Any], fields: type[Fields], file: Path | str, sparse: bool = True) -> None:
    """Raise CheckpointError for fields of a wrong type or out of bounds. sparse: required fields may be missing, as in
    a file that relies on defaults."""
    try:
        fields.model_validate(content)
    except ValidationError as error:
        wrong: dict[str, list[str]] = {}
        for each in error.errors(include_url=False):
            if not (sparse and each["type"] == "missing"):
                place = place_of(each["loc"], content, missing=each["type"] == "missing")
                value = "" if each["type"] == "missing" else f", not {reprlib.repr(each['input'])}"
                wrong.setdefault(place, []).append(each["msg"].removeprefix("Value error, ") + value)
        for place, messages in wrong.items():  # report only the first, on one line
            raise CheckpointError(f"{file}: {place}: {' or '.join(dict.fromkeys(messages))}") from None


def place_of(loc: tuple[int | str, ...], content: Any, missing: bool) -> str:
    """The path of a field in the file: `loc` without the type names that pydantic inserts for unions. missing: the
    last part of `loc` names a field that `content` does not have."""
    path = []
    for index, part in enumerate(loc):
        parts = range(len(content)) if isinstance(content, list) else content if isinstance(content, Mapping) else ()
        if part in parts:
            path.append(str(part))
            content = content[part]
        elif missing and index == len(loc) - 1:
            path.append(str(part))
    return ".".join(path)


def _check_values(content: Any, file: Path, escapes: bool) -> None:
    """Reject deep nesting, and lone surrogates, which cannot be encoded when the file is written again."""
    level = [content]
    for _ in range(MOST_NESTED):
        inner = []
        for each in level:
            values = [*each, *each.values()] if isinstance(each, dict) else each
            inner += [value for value in values if isinstance(value, (dict, list))]
            if escapes:
                _check_texts([value for value in values if isinstance(value, str)], file)
        if not (level := inner):
            return
    _refuse_nesting(file)


def _check_texts(texts: list[str], file: Path) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as problem:
        raise CheckpointError(f"{file} has half a surrogate pair ({problem}), which is not valid text") from None


def _refuse_nesting(file: Path) -> NoReturn:
    raise CheckpointError(f"{file} nests lists and objects more than {MOST_NESTED} deep") from None


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new directory beside `path` that replaces `path` when the block ends and is removed if the block fails. An
    OSError (no space, no permission, a file to copy from that is gone) becomes a CheckpointError."""
    try:
        with _written_whole(path) as directory:
            yield directory
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"{path} was not written ({one_line(problem)}); it is as it was") from problem


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.saving-{os.getpid()}")
    old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def file_written_whole(path: Path) -> Iterator[Path]:
    """A new path beside `path`; the file written there replaces `path` when the block ends and is removed if the block
    fails. `path`'s folder must exist."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
