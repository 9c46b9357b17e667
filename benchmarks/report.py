"""Formatting of rows as a table and as JSON. A failed check is shown instead of a ratio."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.case import Row

SCHEMA = "llava_fast-benchmark/1"
_COLUMNS = ("backend", "median ms", "p20", "p80", "cpu", "peak MiB", "rate", "of floor", "check", "speed-up")


def table(rows: Sequence[Row]) -> str:
    """Format rows as plain text: a heading for each case, a line for each backend."""
    lines: list[str] = []
    for case in dict.fromkeys((row.suite, row.model, row.case) for row in rows):
        mine = [row for row in rows if (row.suite, row.model, row.case) == case]
        cells = [_COLUMNS, *(_cells(row) for row in mine)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
        lines += ["", f"{case[0]}: {case[1]}; {case[2]}; {_floor(mine[0])}"]
        for line in cells:
            padded = [
                cell.ljust(w) if i in (0, 8) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ]
            lines.append("  " + "  ".join(padded).rstrip())
        lines += [f"  CHECK FAILED for {row.backend}: {_why(row)}" for row in mine if failed(row)]
    return "\n".join(lines[1:])


def write_json(rows: Iterable[Row], path: Path) -> None:
    """Write {"schema": ..., "rows": [...]}. Every row is self-contained, so files can be merged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> list[Row]:
    """Read the rows of a file written by `write_json`. Raises ValueError for anything else."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no benchmark result: its schema is not {SCHEMA!r}")
    return [Row(**row) for row in content["rows"]]


def failed(row: Row) -> bool:
    return row.check is not None and not row.check["passed"]


def _cells(row: Row) -> tuple[str, ...]:
    peak = "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:.0f}"
    times = ("-" if t is None else f"{1e3 * t:.4g}" for t in (row.median, row.p20, row.p80, row.cpu))
    if row.check is None:
        check = "reference" if row.backend == row.reference else "not checked"
    else:
        check = f"{'passed' if row.check['passed'] else 'FAILED'} ({row.check['value']:.1e})"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x{' (disturbed)' * row.disturbed}"
    return (row.backend, *times, peak, f"{row.rate:.4g} {row.unit}/s", f"{100 * row.floor_share:.0f}%", check, ratio)


def _floor(row: Row) -> str:
    return f"floor {1e3 * row.floor_seconds:.3g} ms ({row.floor_bound})"


def _why(row: Row) -> str:
    check = row.check
    detail = f" ({check['detail']})" if check["detail"] else ""
    return f"{check['name']} is {check['value']:.3g}, allowed {check['limit']:.3g}{detail}; no speed-up is given"
