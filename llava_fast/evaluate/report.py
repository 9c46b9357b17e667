"""The report of an evaluation: one page that asks nothing of elsewhere, and small copies of the pictures beside it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

SHOWN = (
    "id",
    "question",
    "prompt",
    "reference",
    "answer",
    "read",
    "score",
    "categories",
    "pictures",
    "error",
    "finish",
)
JUDGED = ("review", "judged")


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Write OUT/report/index.html from the content of results.json; returns its path."""
    tasks = {}
    for name, task in results["tasks"].items():
        rows = [{key: row[key] for key in (*SHOWN, *JUDGED) if key in row} for row in task["answers"]]
        for row, whole in zip(rows, task["answers"], strict=True):
            if "options" in whole.get("facts", {}):
                row["options"] = whole["facts"]["options"]
        tasks[name] = {key: value for key, value in task.items() if key != "answers"} | {"rows": rows}
    data = {"model": results["model"], "version": results["llava_fast"], "tasks": tasks}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (files("llava_fast") / "evaluate" / "page" / "report.html").read_text(encoding="utf-8")
    title = html.escape(Path(str(results["model"].get("path", "evaluation"))).name)
    path = out / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    before, after = page.replace("{{title}}", title).split("{{data}}")
    path.write_text(before + text + after, encoding="utf-8")
    return path
