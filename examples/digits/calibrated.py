"""Measure what calibration gains in 4 bits on the demo model: the error of its logits and the share of digits right, on
held-out scans, of weights rounded to nearest, by GPTQ and by AWQ.

python examples/digits/calibrated.py --canvases 1000

Needs llm-compressor (`pip install 'llava_fast[calibrate]'`). Writes calibrated.json beside this file, after each form:
machine, versions, the error, and the shares of `evaluate` for questions to read all digits.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import evaluate
import make_data
import numpy as np
import quantised
import torch
import typer

import llava_fast
from llava_fast import Quantisation
from llava_fast.demo import compose, split_scans
from llava_fast.demo.run import model_path
from llava_fast.train.data.samples import Source, read_sources

SAMPLES = 128
"""Canvases of training scans that calibrate."""
ERROR_CANVASES = 100
"""Canvases of held-out scans, with a question of each kind and its answer, on which the logits are compared."""
FORMS: dict[str, tuple[Quantisation, str | None]] = {
    f"group {group}, {name or 'nearest'}": (Quantisation("int4", group), name)
    for group in (32, 128)
    for name in (None, "gptq", "awq")
}


def write_data(folder: Path, canvases: int, held_out: bool) -> Path:
    """A data file in LLaVA's format, with the pictures: canvases of held-out scans or of the others."""
    (folder / "images").mkdir(parents=True)
    scans = split_scans()[held_out]
    with mock.patch.object(make_data, "training_scans", return_value=scans):
        records = [make_data.conversation(folder, "full", make_data.FULL_SHARES, number) for number in range(canvases)]
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@torch.no_grad()
def logits(model: llava_fast.Llava, data: Path) -> torch.Tensor:
    """[rows, vocabulary] of every row of the conversations in a data file."""
    table = read_sources([Source(path=str(data))])
    return torch.cat([model(model.prepare([sample.request], labels=True), "all").logits for sample in table])


def quantise(form: tuple[Quantisation, str | None], data: Path, samples: int = SAMPLES) -> llava_fast.Llava:
    """The demo model in one of FORMS."""
    how, method = form
    if method is None:
        return llava_fast.load(model_path(), device="cpu", quantize=how)
    return llava_fast.calibrate(llava_fast.load(model_path(), device="cpu"), data, how, method=method, samples=samples)


def main(
    canvases: Annotated[int, typer.Option(help="How many held-out canvases.")] = 1000,
    form: Annotated[list[str] | None, typer.Option(help="Measure these forms alone, and keep the others.")] = None,
) -> None:
    """Measure and write calibrated.json."""
    path = Path(__file__).with_name("calibrated.json")
    if not form:
        path.unlink(missing_ok=True)
    report: dict[str, Any] = {
        "canvases": canvases,
        "samples": SAMPLES,
        "error_canvases": ERROR_CANVASES,
        "machine": platform.processor() or platform.machine(),
        "versions": {"llava_fast": llava_fast.__version__}
        | {name: version(name) for name in ("torch", "transformers", "llmcompressor")},
    }
    rng = np.random.default_rng(2026)
    drawn = [compose(rng, split_scans()[1]) for _ in range(canvases)]  # those of quantised.py
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "calibration", SAMPLES, held_out=False)
        held_out = write_data(Path(folder) / "held_out", ERROR_CANVASES, held_out=True)
        exact = logits(llava_fast.load(model_path(), device="cpu"), held_out)
        for name in form or FORMS:
            start = time.perf_counter()
            model = quantise(FORMS[name], data)
            seconds = time.perf_counter() - start
            error = float((logits(model, held_out) - exact).norm() / exact.norm())
            with mock.patch.multiple(evaluate, BATCH=quantised.BATCH, KINDS=("read",)):
                shares = evaluate.evaluate(model, drawn, None, None, name)
            found = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
            found[name] = {"logits_error": error, "seconds": round(seconds, 1), **shares}
            report["results"] = {each: found[each] for each in FORMS if each in found}
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            typer.echo(f"{name}: logits off by {error:.4f} of their norm, {100 * shares['digits']:.2f} % of digits")


if __name__ == "__main__":
    typer.run(main)
