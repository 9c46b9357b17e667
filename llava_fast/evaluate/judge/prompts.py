"""The judge's prompts: text files with {placeholders}, built in or from the user."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from pathlib import Path

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.results import make_folder
from llava_fast.train.data.files import read_text

NAMES = {
    "pair": ("context", "question", "first", "second"),
    "pair-picture": ("question", "first", "second", "correct"),
    "mm-vet": ("question", "reference", "answer"),
    "scienceqa-answer": ("question", "context", "options"),
    "scienceqa-ensemble": ("question", "context", "options", "blind", "seeing"),
}
"""Prompt -> its placeholders. All except `context` are required."""
_NAME = re.compile(r"\{(\w+)\}")


class Prompts:
    """The prompts in `folder`, and the built-in ones for missing files. Raises EvaluationError for a prompt with a
    missing or an unknown placeholder, and if there is no such folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise EvaluationError(f"there is no folder of prompts {folder}: --write-prompts makes one")
        self.texts = {}
        for prompt, names in NAMES.items():
            own = folder / f"{prompt}.txt" if folder is not None else None
            where = f"the prompt {own}"
            self.texts[prompt] = text = read_text(str(own)) if own is not None and own.exists() else _shipped(prompt)
            found = set(_NAME.findall(text))
            for name in sorted(found - set(names)):
                raise EvaluationError(f"{where} has {{{name}}}, which nothing fills: use {', '.join(names)}")
            for name in names:
                if name not in found and name != "context":
                    raise EvaluationError(f"{where} lacks {{{name}}}")

    def fill(self, prompt: str, **values: str) -> str:
        """Return a prompt with its placeholders replaced. Braces in the values are kept."""
        return _NAME.sub(lambda found: values[found[1]], self.texts[prompt]).strip()

    def digest(self) -> str:
        return hashlib.blake2b(repr(sorted(self.texts.items())).encode(), digest_size=6).hexdigest()


def write(folder: Path) -> None:
    """Write the built-in prompts to files for editing. Raises EvaluationError if one of them exists, and if the folder
    cannot be made."""
    make_folder(folder)
    for prompt in NAMES:
        path = folder / f"{prompt}.txt"
        if path.exists():
            raise EvaluationError(f"{path} exists: give another folder")
        path.write_text(_shipped(prompt), encoding="utf-8")


def _shipped(prompt: str) -> str:
    return (files("llava_fast") / "evaluate" / "judge" / "prompts" / f"{prompt}.txt").read_text(encoding="utf-8")
