"""`llava-fast batch` beside a loop of `generate`: pictures a second on the demo model, in one run.

    python -m benchmarks.batch --output-json batch.json      # one process, two Ray workers, a loop

Each way answers the same questions about digits, a picture each, in turns. A rate is the median round's, after one
that is not counted; the Ray workers, whose start takes seconds, are timed from when each has answered a first chunk.
The loop calls `generate` for one request at a time. Rates are given only if all answers are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import machine

TOKENS = 16


def write_questions(folder: Path, number: int, seed: int = 0) -> Path:
    """A table of questions about canvases of digits, each with its own picture."""
    from llava_fast.demo import canvas, questions

    rng, scans = np.random.default_rng(seed), canvas.split_scans()[1]
    table = folder / "questions.jsonl"
    with open(table, "w") as file:
        for row in range(number):
            image = canvas.compose(rng, scans, count=int(rng.integers(1, canvas.MAX_DIGITS + 1))).image
            Image.fromarray(image).save(folder / f"{row}.png")
            question = questions.ask(rng, questions.KINDS[int(rng.integers(len(questions.KINDS)))])
            file.write(json.dumps({"id": row, "image": f"{row}.png", "question": question}) + "\n")
    return table


def loop(model_path: str, table: Path) -> Callable[[], tuple[float, list[str]]]:
    """A request after the other."""
    import llava_fast

    model = llava_fast.load(model_path, device="cpu")
    rows = [json.loads(line) for line in table.read_text().splitlines()]

    def answers() -> tuple[float, list[str]]:
        began, made = time.monotonic(), []
        for row in rows:
            content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
            request = {"messages": [{"role": "user", "content": content}], "images": [str(table.parent / row["image"])]}
            made.append(model.generate([request], max_new_tokens=TOKENS)[0].text)
        return len(rows) / (time.monotonic() - began), made

    return answers


def batch(model_path: str, table: Path, workers: int = 0) -> Callable[[], tuple[float, list[str]]]:
    """`llava-fast batch`, in this process or on so many Ray workers."""
    from llava_fast.batch import job
    from llava_fast.batch.answering import Settings
    from llava_fast.batch.cluster import Cluster
    from llava_fast.batch.source import open_source
    from llava_fast.generation.sampling import Sampling

    spec = job.ModelSpec(model_path, {"device": "cpu"})
    settings = Settings(prompt="{question}", sampling=Sampling(max_new_tokens=TOKENS, seed=0))
    runs = Cluster(workers=workers) if workers else job.in_process

    def answers() -> tuple[float, list[str]]:
        times: list[tuple[float, int]] = []

        def timed(*given: Any) -> job.Steps:
            steps = runs(*given)
            times.append((time.monotonic(), 0))
            for rows in steps:
                if rows:
                    times.append((time.monotonic(), len(rows)))
                yield rows

        output = table.parent / f"out-{workers}.jsonl"
        job.run(spec, open_source(str(table)), str(output), settings, overwrite=True, runs=timed, say=lambda text: None)
        if workers:  # from when each has answered its first chunk, which is not counted
            times = times[workers:]
        rate = sum(rows for _, rows in times[1:]) / (times[-1][0] - times[0][0])
        return rate, [json.loads(line)["answer"] for line in output.read_text().splitlines()]

    return answers


def main() -> None:
    from llava_fast.demo.run import model_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(model_path()))
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray-workers", type=int, default=2, help="0: without Ray.")
    parser.add_argument("--output-json", type=Path)
    chosen = parser.parse_args()
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        table = write_questions(Path(folder), chosen.pictures)
        ways = {"generate, one at a time": loop(chosen.model, table), "batch, one process": batch(chosen.model, table)}
        if chosen.ray_workers:
            ways[f"batch --ray, {chosen.ray_workers} workers"] = batch(chosen.model, table, chosen.ray_workers)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        expected: list[str] | None = None
        for number in range(chosen.rounds + 1):
            for name, answers in ways.items():
                rate, made = answers()
                expected = expected or made
                if made != expected:
                    raise SystemExit(f"{name}: the answers differ, so there is nothing to compare")
                if number:
                    rates[name].append(rate)
    rows = [{"way": name, "pictures_a_second": round(median(found), 1)} for name, found in rates.items()]
    for row in rows:
        print(row)
    if chosen.output_json:
        about = {"machine": machine.describe("cpu", 2), "versions": machine.versions(), "commit": machine.commit()}
        result = {"schema": "llava_fast-batch-benchmark/1", **about}
        result |= {"settings": {**vars(chosen), "output_json": None}, "rows": rows}
        chosen.output_json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
