"""Output of data generation: a file in LLaVA's format, written atomically, and a report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_fast.errors import DataError, LlavaFastError
from llava_fast.storage.files import file_written_whole


@dataclass
class Report:
    """Counts of a run: samples by kind, and rejected replies by reason."""

    made: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the counts as text, one line each."""
        total = self.made.total()
        kinds = ", ".join(f"{count:,} {kind} ({count / total:.0%})" for kind, count in self.made.most_common())
        lines = [f"{total:,} samples: {kinds}" if total else "no sample was made"]
        reasons = [f"{count:,} {reason}" for reason, count in self.left_out.most_common() if count]
        lines += ["left out: " + ", ".join(reasons)] if reasons else []
        return lines + [f"{name}: {value}" for name, value in self.notes.items() if isinstance(value, str)]

    def to_json(self) -> dict[str, Any]:
        return {"made": dict(self.made), "left_out": dict(+self.left_out), **self.notes}


def check_output(path: Path) -> None:
    """Raise DataError if the file cannot be written. This is checked before requests are sent."""
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"the output {path.name} must be a .json or .jsonl file")
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a file in it")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder of {path} cannot be made: {error.strerror or error}") from None


def write_samples(path: Path, samples: Iterable[dict[str, Any]]) -> int:
    """Write a JSON list with one sample per line, or JSON lines for .jsonl. Returns the number of samples. Raises
    DataError."""
    lines = path.suffix == ".jsonl"
    count = 0
    try:
        with file_written_whole(path) as new, new.open("w", encoding="utf-8") as file:
            for count, sample in enumerate(samples, start=1):
                file.write(("" if lines else "[\n" if count == 1 else ",\n") + json.dumps(sample) + "\n" * lines)
            file.write("" if lines else "\n]\n" if count else "[]\n")
    except LlavaFastError:  # some are OSErrors too, such as one for a missing image
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None
    return count


def write_report(path: Path, report: Report) -> Path:
    """Write the report next to an output file and return its path. Raises DataError."""
    beside = path.with_name(f"{path.stem}.report.json")
    try:
        beside.write_text(json.dumps(report.to_json(), indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{beside} cannot be written: {error.strerror or error}") from None
    return beside


def turns(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Convert questions and answers to LLaVA's conversation format."""
    return [
        {"from": speaker, "value": text}
        for question, answer in pairs
        for speaker, text in (("human", question), ("gpt", answer))
    ]
