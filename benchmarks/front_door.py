"""Benchmarks of the public API only (`load`, `generate`, `stream`, `prepare`, the model's forward pass), so that
commits with different internals can be compared. Without transformers and without checks: parity tests cover the
answers.

    python -m benchmarks checkpoint 100m /tmp/100m
    python -m benchmarks compare A B --run "$PWD/benchmarks/front_door.py --model llava_fast/demo_model,/tmp/100m"
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROMPT = "USER: <image>\nWhat is shown in this picture? ASSISTANT:"
TEXT = "USER: What is the capital of France? ASSISTANT:"
SUITES = ("load", "processor", "prefill", "decode", "train-step")
Work = Callable[[], object]


def cases(folder: Path, suites: list[str], tokens: int) -> Iterator[tuple[str, str, Work]]:
    """(suite, title, what is timed) for a checkpoint directory."""
    import numpy as np
    import torch

    import llava_fast

    if "load" in suites:
        yield "load", "checkpoint", lambda: llava_fast.load(folder)
    model = llava_fast.load(folder)
    pictures = [
        np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        for number in range(8)
    ]

    def asked(count: int) -> list[dict]:
        return [{"prompt": PROMPT, "images": [picture]} for picture in pictures[:count]]

    def trained(batch) -> None:
        model(batch, logits="none").loss.backward()
        model.zero_grad()

    if "processor" in suites:
        for count in (1, 4):
            requests = asked(count)
            yield "processor", f"{count} of 320x240", lambda requests=requests: model.processor.prepare(requests)
    if "prefill" in suites:
        for count in (1, 4):
            batch = model.prepare(asked(count))
            rows = f"{count} x {batch.plan.lengths[0]} rows"
            yield "prefill", f"forward, {rows}", torch.inference_mode()(lambda batch=batch: model(batch))
            requests = asked(count)
            yield (
                "prefill",
                f"generate 1 token, {rows}",
                lambda requests=requests: model.generate(requests, max_new_tokens=1),
            )
    if "decode" in suites:
        for count in (1, 2, 8):
            requests = [{"prompt": TEXT} for _ in range(count)]
            yield (
                "decode",
                f"generate, {count} x {tokens} tokens",
                lambda requests=requests: model.generate(requests, max_new_tokens=tokens, ignore_eos=True),
            )
        requests = asked(8)
        yield (
            "decode",
            f"generate, 8 images, {tokens} tokens each",
            lambda: model.generate(requests, max_new_tokens=tokens, ignore_eos=True),
        )
        # With a stop string the text is made token by token, which bd3b065 left to the end without one.
        yield (
            "decode",
            f"stream, {tokens} tokens",
            lambda: list(
                model.stream({"prompt": TEXT}, max_new_tokens=tokens, ignore_eos=True, stop="never in an answer")
            ),
        )
    if "train-step" in suites:
        model.requires_grad_(True)
        model.vision_tower.requires_grad_(False)
        answer = "A temple beside a lake, with willows and a bridge. " * 2
        for count in (1, 4):
            samples = [
                {
                    "messages": [
                        {"role": "user", "content": "<image>\nWhat is shown?"},
                        {"role": "assistant", "content": answer},
                    ],
                    "images": [picture],
                }
                for picture in pictures[:count]
            ]
            batch = model.prepare(samples, labels=True)
            rows = sum(batch.plan.lengths)
            yield "train-step", f"{count} samples, {rows} rows", lambda batch=batch: trained(batch)


def seconds(work: Work, budget: float) -> list[float]:
    """Times of calls over `budget` seconds, at least three, after one that is not counted."""
    work()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < budget:
        before = time.perf_counter()
        work()
        times.append(time.perf_counter() - before)
    return times


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Checkpoint directories, with commas.")
    parser.add_argument("--suites", default=",".join(SUITES), help="Some of them, with commas.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="Of timed calls for each case.")
    parser.add_argument("--tokens", type=int, default=96, help="Of an answer (decode).")
    parser.add_argument("--only", default="", help="Cases with one of these words in their title alone, with |.")
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch and the compiled module are loaded
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    torch.set_num_threads(options.threads)
    rows = []
    for name in options.model.split(","):
        folder = Path(name).resolve()
        for suite, title, work in cases(folder, options.suites.split(","), options.tokens):
            if not any(words in title for words in options.only.split("|")):
                continue
            gc.collect()
            times = seconds(work, options.seconds)
            label = f"{title}; {options.threads} thread(s)"
            rows.append({"suite": suite, "model": folder.name, "case": label, "backend": "llava_fast"})
            rows[-1] |= {"median": statistics.median(times), "least": min(times), "samples": len(times), "check": None}
            print(f"{suite}: {folder.name}; {label}: {1e3 * rows[-1]['median']:.4g} ms", flush=True)
    if options.output_json is not None:
        options.output_json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
