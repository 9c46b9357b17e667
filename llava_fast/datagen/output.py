"""What a maker of data leaves: a LLaVA-format file, written whole or not at all, and a report of what became of all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_fast.errors import DataError


@dataclass
class Report:
    """Counts of a run: samples made by kind, and what was left out by reason."""

    made: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For a person, a line each."""
        total = self.made.total()
        kinds = ", ".join(f"{count:,} {kind} ({count / total:.0%})" for kind, count in self.made.most_common())
        lines = [f"{total:,} samples: {kinds}" if total else "no sample was made"]
        if self.left_out:
            lines += ["left out: " + ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.most_common())]
        return lines + [f"{name}: {value}" for name, value in self.notes.items() if isinstance(value, str)]

    def to_json(self) -> dict[str, Any]:
        return {"made": dict(self.made), "left_out": dict(self.left_out), **self.notes}


def check_output(path: Path) -> None:
    """Raises DataError now, not after hours of asking, for a file that could not be written."""
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"the output {path.name} must be a .json or .jsonl file")
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a file in it")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder of {path} cannot be made: {error.strerror or error}") from None


def write_samples(path: Path, samples: Iterable[dict[str, Any]]) -> int:
    """A JSON list, a sample a line, or JSON lines for a .jsonl; returns how many. Raises DataError."""
    part = path.with_name(f".{path.name}.part")
    lines = path.suffix == ".jsonl"
    count = 0
    try:
        with open(part, "w", encoding="utf-8") as file:
            for count, sample in enumerate(samples, start=1):
                file.write(("" if lines else "[\n" if count == 1 else ",\n") + json.dumps(sample) + "\n" * lines)
            file.write("" if lines else "\n]\n" if count else "[]\n")
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
    return count


def write_report(path: Path, report: Report) -> Path:
    """The report of an output file, beside it; returns its path. Raises DataError."""
    beside = path.with_name(f"{path.stem}.report.json")
    try:
        beside.write_text(json.dumps(report.to_json(), indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{beside} cannot be written: {error.strerror or error}") from None
    return beside


def turns(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions and answers as LLaVA's conversations."""
    return [
        {"from": speaker, "value": text}
        for question, answer in pairs
        for speaker, text in (("human", question), ("gpt", answer))
    ]
