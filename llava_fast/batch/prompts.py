"""Prompts with columns in them: "What is {object} doing?"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import Formatter
from typing import Any

from llava_fast.errors import BatchError, RequestError

DEFAULTS = ("prompt", "question")


class PromptTemplate:
    """A text in which `{column}` stands for a row's value and {{ and }} for braces. Raises BatchError for other uses of
    braces."""

    def __init__(self, text: str) -> None:
        self.text = text
        advice = "write {column} for a row's value, and {{ and }} for braces"
        try:
            self._parts = [(before, _column(*field)) for before, *field in Formatter().parse(text)]
        except ValueError as error:
            raise BatchError(f"the prompt cannot be read ({error}): {advice}") from None

    @property
    def columns(self) -> list[str]:
        """The columns it names."""
        return [name for _, name in self._parts if name is not None]

    def fill(self, columns: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises RequestError where the row lacks a value."""
        return "".join(before + ("" if name is None else _value(columns, name)) for before, name in self._parts)


def choose_template(text: str | None, columns: frozenset[str] | None) -> PromptTemplate:
    """The template for an input of these columns (None: unknown); without a `text`, a column called prompt or question.
    Raises BatchError where a column is missing."""
    known = ", ".join(sorted(columns or ())) or "none"
    if text is None:
        for name in DEFAULTS:
            if columns is not None and name in columns:
                return PromptTemplate(f"{{{name}}}")
        raise BatchError(
            f"there is no prompt: give --prompt, or a column called {' or '.join(DEFAULTS)} (the columns are {known})"
        )
    template = PromptTemplate(text)
    if not template.text.strip():
        raise BatchError("the prompt is empty: give --prompt a question")
    for name in template.columns:
        if columns is not None and name not in columns:
            raise BatchError(
                f"the prompt names the column {name!r} and the columns are {known}: name one of them, or write "
                "{{ and }} for braces"
            )
    return template


def _column(name: str | None, spec: str | None, change: str | None) -> str | None:
    """What braces name; None after the last. Raises ValueError for braces that hold more than a name."""
    if spec or change:
        raise ValueError(f"{name!r} has a format after it")
    if name is not None and not name.strip():
        raise ValueError("braces with nothing in them")
    return name


def _value(columns: Mapping[str, Any], name: str) -> str:
    value = columns.get(name)
    if value is None:
        raise RequestError(f"the row has no {name!r}, which the prompt names")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
