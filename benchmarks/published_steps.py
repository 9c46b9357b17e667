"""A system's path from tiles to the decoder's inputs beside its published steps: time and peak memory on one thread, in
one process, in turns. No figure is given unless both sides give the same rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.memory import PeakMemory
from benchmarks.timing import Timed, time_in_turns

MOST_ERROR = 1e-4


@torch.inference_mode()
def compare(
    sides: dict[str, Callable[[int], Tensor]], iters: int, warmup: float, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each of two sides, the second of which is the reference. Raises SystemExit if their results differ."""
    results, peaks = [], []
    for run in sides.values():
        run(0)
        with PeakMemory(torch.device("cpu")) as peak:
            results.append(run(0))
        peaks.append(peak.bytes)
    ours, theirs = results
    if len(ours) != len(theirs):
        raise SystemExit(f"{len(ours)} rows and {len(theirs)}: there is nothing to compare")
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if error > MOST_ERROR:
        raise SystemExit(f"the results differ by {error:.1e}: there is nothing to compare")
    times = time_in_turns([Timed(run) for run in sides.values()], iters, warmup, torch.device("cpu"))
    return [
        {"side": name, **about, "rows": len(ours), "error": error, **dataclasses.asdict(time), "peak_bytes": peak}
        for name, time, peak in zip(sides, times, peaks, strict=True)
    ]


def main(doc: str | None, schema: str, measure: Callable[..., list[dict[str, Any]]]) -> None:
    """The command line: measures a picture of 1024x768."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--iters", type=int, default=6)
    parser.add_argument("--output-json", type=Path)
    chosen = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    made = {"schema": schema, "machine": machine.describe("cpu", 1), "versions": machine.versions()}
    made["commit"] = machine.commit()
    made["rows"] = measure(chosen.layers, chosen.width, (1024, 768), chosen.text, chosen.iters, 1.0)
    for row in made["rows"]:
        print(row)
    if chosen.output_json:
        chosen.output_json.write_text(json.dumps(made, indent=1) + "\n")
