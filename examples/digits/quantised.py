"""Measure what rounding weights, products or the KV cache costs the demo model: digits right on held-out scans.

python examples/digits/quantised.py --canvases 1000

Writes quantised.json beside this file: machine, versions and the shares of each form.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated
from unittest import mock

import evaluate
import numpy as np
import typer

import llava_fast
from llava_fast.demo import compose, split_scans
from llava_fast.demo.run import model_path

BATCH = 25  # answers at once: up to 32 decode in the native step
FORMS: dict[str, dict] = {
    "float32": {},
    "int8": {"quantize": "int8"},
    "int4, groups of 32": {"quantize": "int4"},
    "float32, KV cache int8": {"kv_cache": "int8"},
    "int4, KV cache int8": {"quantize": "int4", "kv_cache": "int8"},
    "float32, products in int8": {"precision": "int8"},
    "float32, products in fp8": {"precision": "fp8"},
}


def measure(canvases: int, seed: int = 2026) -> dict[str, dict[str, float]]:
    """The shares of `evaluate`, for each form."""
    rng = np.random.default_rng(seed)
    drawn = [compose(rng, split_scans()[1]) for _ in range(canvases)]
    with mock.patch.object(evaluate, "BATCH", BATCH):
        return {
            name: evaluate.evaluate(llava_fast.load(model_path(), device="cpu", **form), drawn, None, None, name)
            for name, form in FORMS.items()
        }


def main(canvases: Annotated[int, typer.Option(help="How many held-out canvases.")] = 1000) -> None:
    """Measure and write quantised.json."""
    report = {
        "canvases": canvases,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("llava_fast", "torch")},
        "results": measure(canvases),
    }
    Path(__file__).with_name("quantised.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, shares in report["results"].items():
        typer.echo(f"{name}: {100 * shares['digits']:.2f} % of digits")


if __name__ == "__main__":
    typer.run(main)
