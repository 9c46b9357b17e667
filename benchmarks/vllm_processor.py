"""What vLLM's processor costs for a picture, with and without llava_fast: time and bytes, in one process, in turns.

    PYTHONPATH=benchmarks/vllm_site .venv/vllm/bin/python -m benchmarks.vllm_processor --output-json out.json

Both sides get the same picture, never seen before, as a new request: its tiles, its hash, the placeholders in the
prompt. The sizes are LLaVA-NeXT-7B's, without weights. One thread on one core; where the two clocks differ, the machine
was busy.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import machine
from benchmarks.shapes import SHAPES, write_directory

PROMPT = "<image>\nword1 word2 word3"


def processors(folder: str) -> dict[str, Any]:
    """vLLM's own, and llava_fast's, of a directory."""
    from vllm.config import ModelConfig
    from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration as Stock
    from vllm.multimodal.processing import InputProcessingContext
    from vllm.tokenizers import cached_tokenizer_from_config

    from llava_fast.integrations.vllm.classes import fast_class

    config = ModelConfig(folder, dtype="float32", max_model_len=4096)
    context = InputProcessingContext(config, cached_tokenizer_from_config(config))
    kinds = {"vLLM": Stock, "vLLM with llava_fast": fast_class(Stock)}
    return {name: kind._processor_factory.build_processor(context) for name, kind in kinds.items()}


def size_of(made: Any) -> int:
    """Bytes of the tensors that go to the model."""
    items = [item for items in made["mm_kwargs"].values() for item in items]
    tensors = [field.data for item in items for field in item.values()]
    return sum(tensor.nbytes for tensor in tensors)


def measure(rounds: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    rng, found, tokens = np.random.default_rng(0), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_directory(SHAPES["llava-next-7b"], None, Path(folder))
        sides = processors(folder)
        for number in range(rounds + 3):
            image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
            for name in list(sides)[:: 1 if number % 2 else -1]:
                side = sides[name]
                wall, processor = time.perf_counter(), time.process_time()
                made = side(PROMPT, side.info.parse_mm_data({"image": [image]}))
                took = time.perf_counter() - wall, time.process_time() - processor
                tokens.setdefault(number, set()).add(tuple(made["prompt_token_ids"]))
                if number >= 3:
                    found.setdefault(name, []).append((*took, size_of(made)))
    if any(len(each) != 1 for each in tokens.values()):
        raise SystemExit("the two sides' prompts differ, so there is nothing to compare")
    return [
        {
            "processor": name,
            "picture": f"{size[0]}x{size[1]}",
            "wall_ms": round(1e3 * median(one[0] for one in each), 2),
            "processor_ms": round(1e3 * median(one[1] for one in each), 2),
            "megabytes": round(median(one[2] for one in each) / 1e6, 3),
        }
        for name, each in found.items()
    ]


def main() -> None:
    import torch
    import vllm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output-json", type=Path)
    chosen = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    about = {"machine": machine.describe("cpu", 1), "versions": machine.versions() | {"vllm": vllm.__version__}}
    rows = measure(chosen.rounds, (1024, 768))
    for row in rows:
        print(row)
    if chosen.output_json:
        made = {"schema": "llava_fast-vllm-processor/1", **about, "commit": machine.commit(), "rows": rows}
        chosen.output_json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
