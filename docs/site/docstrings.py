"""For griffe: docstrings are prose and columns of plain text. Columns stay columns, and no * is taken for emphasis."""

from __future__ import annotations

import re

import griffe

COLUMNS = re.compile(r"\S {2,}\S")


def as_markdown(docstring: str) -> str:
    """Paragraphs with aligned columns, or indented by four, as text blocks; in the others * and _ are no markup."""
    paragraphs = []
    for paragraph in re.split(r"\n[ \t]*\n", docstring):
        if COLUMNS.search(paragraph) or paragraph.startswith("    "):
            paragraphs.append(f"```text\n{paragraph}\n```")
        else:
            words = re.split(r"(`[^`]*`)", paragraph)
            words[::2] = [re.sub(r"([*_<\[\]])", r"\\\1", text) for text in words[::2]]
            paragraphs.append("".join(words))
    return "\n\n".join(paragraphs)


class PlainDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
