"""The report of an evaluation: one page that asks nothing of elsewhere, and small copies of the pictures beside it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

SHOWN = "id question prompt reference answer read score categories pictures error finish review".split()
MOST = 5000  # questions of a task that a page holds


def shown(count: int) -> Sequence[int]:
    """Which of a task's questions the report holds: all, or MOST of them at even distances."""
    return range(count) if count <= MOST else [number * count // MOST for number in range(MOST)]


def write(results: Mapping[str, Any], out: Path) -> Path:
    """Write OUT/report/index.html from the content of results.json; returns its path."""
    tasks = {}
    for name, task in results["tasks"].items():
        rows = []
        for number in shown(len(task["answers"])):
            whole = task["answers"][number]
            rows.append({key: whole[key] for key in SHOWN if key in whole})
            if "options" in whole.get("facts", {}):
                rows[-1]["options"] = whole["facts"]["options"]
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
