"""Comparison of two commits: each is built in a temporary git worktree, and their suites are run alternately.

The order alternates (A B, B A, ...), so that changes of the machine's speed affect both commits alike. A ratio is
computed in each round. Its spread over the rounds shows the noise, and so do the ratios of A to itself if each round
runs A twice (--control).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks import machine

SCHEMA = "llava_fast-compare/1"
ROOT = Path(__file__).resolve().parents[1]
SUITES = "benchmarks/run.py all --model tiny --backend llava_fast,hf-eager"
BUILD = f"{shlex.quote(sys.executable)} setup.py --quiet build_ext --inplace"

Key = tuple[str, str, str, str]
"""(suite, model, case, backend), by which rows of the two commits are matched."""


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="The baseline: a commit, branch or tag.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The commit whose speed-up over A is printed.")],
    run: Annotated[
        str, typer.Option(help="Arguments of python in each checkout, which must write --output-json.")
    ] = SUITES,
    rounds: Annotated[int, typer.Option(min=1, help="Number of runs of each commit.")] = 3,
    control: Annotated[bool, typer.Option(help="Run A twice in each round and print its ratios to itself.")] = False,
    build: Annotated[str, typer.Option(help='Command that builds a checkout; "" to skip the build.')] = BUILD,
    output_json: Annotated[Path | None, typer.Option(help="Write all rows and ratios to this file.")] = None,
) -> None:
    """Measure commits A and B alternately on this machine and print the speed-up of B over A.

    python -m benchmarks compare main HEAD --run "benchmarks/run.py decode --model llava-next-7b --layers 2"

    Uncommitted changes are not measured. Exits with 1 if a run fails or a result fails its check.
    """
    commits = [_git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", name=name) for name in (first, second)]
    about = {"machine": machine.describe("cpu", 1), "versions": machine.versions(), "run": run}
    runs: list[dict] = []
    with worktrees(commits) as folders:
        for folder in dict.fromkeys(folders):
            if build:
                _run(shlex.split(build), folder)
        for number in range(rounds):
            order = [("A", 0), ("B", 1)] + ([("A again", 0)] if control else [])
            for side, which in order if number % 2 == 0 else order[::-1]:
                typer.echo(f"round {number + 1} of {rounds}: {(first, second)[which]}", err=True)
                runs.append({"side": side, "round": number, "rows": measured(folders[which], run)})
    found = ratios(runs)
    typer.echo(table(found, first, second))
    again = ratios(runs, ("A", "A again")) if control else []
    if control:
        typer.echo(f"\nThe noise:\n{table(again, first, f'{first} again')}")
    if output_json is not None:
        names = dict(
            zip("AB", ({"name": n, "commit": c} for n, c in zip((first, second), commits, strict=True)), strict=True)
        )
        content = {"schema": SCHEMA, **about, **names, "ratios": found, "control": again, "runs": runs}
        output_json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"wrote {output_json}")
    if any(row["ratio"] is None for row in found):
        typer.echo("a result fails its check, or is there for one commit only: it has no ratio", err=True)
        raise typer.Exit(1)


@contextmanager
def worktrees(commits: Sequence[str]) -> Iterator[list[Path]]:
    """Create temporary checkouts, one per distinct commit."""
    with tempfile.TemporaryDirectory(prefix="llava_fast-compare-") as folder:
        paths = {commit: Path(folder) / commit for commit in commits}
        try:
            for commit, path in paths.items():
                _git("worktree", "add", "--quiet", "--detach", str(path), commit, name=commit)
            yield [paths[commit] for commit in commits]
        finally:
            for path in paths.values():
                subprocess.run(
                    ["git", "-C", ROOT, "worktree", "remove", "--force", path], capture_output=True, check=False
                )


def measured(folder: Path, run: str) -> list[dict]:
    """Run the command in a checkout and return its rows. If a check fails, the command exits with 1 after writing
    them."""
    path = folder / "compare.json"
    path.unlink(missing_ok=True)
    _run([sys.executable, *shlex.split(run), "--output-json", str(path)], folder, allowed=(0, 1))
    if not path.is_file():
        raise typer.BadParameter(f"{run!r} wrote no --output-json in {folder.name}", param_hint="--run")
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def ratios(runs: Iterable[dict], sides: tuple[str, str] = ("A", "B")) -> list[dict]:
    """Return for each kind of row the median, minimum and maximum over the rounds of (A's median seconds / B's), or
    None
    if a row is missing or a check failed. `sides` are the names of A's and B's runs."""
    runs = [{**one, "side": "AB"[sides.index(one["side"])]} for one in runs if one["side"] in sides]
    by_key: dict[Key, dict[tuple[str, int], dict]] = {}
    for one in runs:
        for row in one["rows"]:
            key = (row["suite"], row["model"], row["case"], row["backend"])
            by_key.setdefault(key, {})[one["side"], one["round"]] = row
    counted = {one["round"] for one in runs}
    return [_ratio(key, rows, counted) for key, rows in by_key.items()]


def _ratio(key: Key, rows: dict[tuple[str, int], dict], counted: set[int]) -> dict:
    found = dict(zip(("suite", "model", "case", "backend"), key, strict=True))
    seconds = {side: [rows[side, n]["median"] for n in sorted(counted) if (side, n) in rows] for side in "AB"}
    times = {f"{side}_seconds": median(seconds[side]) if seconds[side] else None for side in "AB"}
    failed = any(row["check"] is not None and not row["check"]["passed"] for row in rows.values())
    why = "check failed" if failed else None
    if not all(len(seconds[side]) == len(counted) for side in "AB"):
        why = f"only in {'A' if seconds['A'] else 'B'}" if not all(seconds.values()) else "missing in a round"
    if why:
        return {**found, **times, "ratio": None, "least": None, "most": None, "why": why}
    each = [a / b for a, b in zip(seconds["A"], seconds["B"], strict=True)]
    return {**found, **times, "ratio": median(each), "least": min(each), "most": max(each), "why": None}


def table(found: Sequence[dict], first: str, second: str) -> str:
    """Return a table with a line per row: both medians in ms, the speed-up of B, and its range over the rounds."""
    lines = [("what", "backend", f"A: {first}, ms", f"B: {second}, ms", "B is", "rounds")]
    for row in found:
        ms = ("-" if row[f"{side}_seconds"] is None else f"{1e3 * row[f'{side}_seconds']:.4g}" for side in "AB")
        what = f"{row['suite']}: {row['model']}; {row['case']}"
        if row["ratio"] is None:
            lines.append((what, row["backend"], *ms, row["why"], ""))
        else:
            spread = f"{row['least']:.3f} to {row['most']:.3f}"
            lines.append((what, row["backend"], *ms, f"{row['ratio']:.3f}x as fast", spread))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _git(*arguments: str, name: str) -> str:
    result = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise typer.BadParameter(f"{name!r} is no commit of this repository: {result.stderr.strip() or 'unknown name'}")
    return result.stdout.strip()


def _run(command: list[str], folder: Path, allowed: tuple[int, ...] = (0,)) -> None:
    """Run a command with the checkout first on the Python path, so that no installed llava_fast is imported."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    result = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode not in allowed:
        raise typer.BadParameter(f"{shlex.join(command)} failed in {folder.name}:\n{result.stdout[-2000:]}")
