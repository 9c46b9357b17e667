"""Finds data files, and reads JSON lists and JSON lines value by value; errors name file, line and column."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_fast.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")


def expand(path: str, beside: str = "") -> list[str]:
    """The files of a path: the path itself, the expansion of "{a,b}.json", or the sorted matches of a glob. A relative
    path that does not exist is also looked up in the folder `beside`. Raises DataError if there is no file.
    """
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces and not os.path.exists(path):
        before, after = path[: braces.start()], path[braces.end() :]
        return [file for choice in braces[1].split(",") for file in expand(f"{before}{choice}{after}", beside)]
    path = os.path.expanduser(path)
    for candidate in (path, os.path.join(beside, path)):
        found = [candidate] if os.path.exists(candidate) else sorted(glob.glob(candidate, recursive=True))
        if found:
            return found
    raise DataError(f"there is no data file {path} (looked from {os.getcwd()}): check the path")


def read_text(path: str) -> str:
    """The text of a file without a byte order mark. Raises DataError if it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path} is not UTF-8: byte {error.start} is 0x{byte:02x}; convert the file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def read_values(path: str) -> Iterator[Any]:
    """The values of a JSON list or of JSON lines, depending on the content. Raises DataError with line and column."""
    if not path.lower().endswith((".json", ".jsonl")):
        raise DataError(f"{path} is neither .json nor .jsonl (nor a single .yaml mixture): convert it")
    text = read_text(path)
    try:
        yield from _values(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: invalid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; thousands of nested brackets
        raise DataError(f"{path} cannot be read as JSON: {error}") from None


def _values(text: str) -> Iterator[Any]:
    """Yields one value at a time, so that a large file is never in memory as Python objects."""
    decode = json.JSONDecoder().raw_decode
    at = _after_space(text, 0)
    listed = text.startswith("[", at)
    if listed:
        at = _after_space(text, at + 1)
        if text.startswith("]", at):
            return
    while at < len(text) or listed:
        value, at = decode(text, at)
        yield value
        at = _after_space(text, at)
        if not listed:
            continue
        if text.startswith(",", at):
            at = _after_space(text, at + 1)
        elif text.startswith("]", at):
            at = _after_space(text, at + 1)
            if at < len(text):
                raise json.JSONDecodeError("unexpected text after the list", text, at)
            return
        else:
            raise json.JSONDecodeError("expected ',' or ']'", text, at)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
