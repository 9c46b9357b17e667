"""A checkpoint's chat templates by name, from any of the files that transformers reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.storage.files import read_json_if_there, read_text

_JINJA, _MORE_JINJA = "chat_template.jinja", "additional_chat_templates"


@dataclass(frozen=True)
class Templates:
    """Chat templates by name, and the file they come from. Most checkpoints have only one, "default"."""

    file: Path
    sources: Mapping[str, str]

    def choose(self, name: str = "default") -> str:
        """The Jinja source of one template. Raises CheckpointError for an unknown name and an empty template."""
        if name not in self.sources:
            others = ", ".join(self.sources) or "none"
            raise CheckpointError(
                f"{self.file} has no chat template named {name!r}; choose one by chat_template=; it has: {others}"
            )
        if not self.sources[name].strip():
            raise CheckpointError(f"{self.file}: the chat template {name!r} is empty; choose another by chat_template=")
        return self.sources[name]


def find_templates(path: Path, tokenizer: Any, tokenizer_path: Path) -> Templates | None:
    """The templates of a checkpoint, from the first of: chat_template.jinja and additional_chat_templates/, the older
    chat_template.json or processor_config.json, the tokenizer. None if there is none. Raises CheckpointError for an
    unreadable template."""
    named = {file.stem: file for file in sorted((path / _MORE_JINJA).glob("*.jinja"))}
    if (path / _JINJA).exists():
        named["default"] = path / _JINJA
    if named:
        return Templates(path / _JINJA, {name: read_text(file) for name, file in named.items()})
    for file, kind in (("chat_template.json", fields.TemplateFile), ("processor_config.json", fields.Processor)):
        given = read_json_if_there(path / file, kind).get("chat_template")
        if given is not None:
            return Templates(path / file, _by_name(given))
    given = getattr(tokenizer, "chat_template", None)
    return None if given is None else Templates(tokenizer_path / "tokenizer_config.json", _by_name(given))


def _by_name(given: str | dict[str, str] | list[dict[str, str]]) -> dict[str, str]:
    """Templates by name, from one template, a mapping, or a list of {"name": ..., "template": ...}."""
    if isinstance(given, str):
        return {"default": given}
    return dict(given) if isinstance(given, dict) else {each["name"]: each["template"] for each in given}
