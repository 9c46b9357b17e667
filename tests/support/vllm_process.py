"""vLLM's greedy answers, from a process of its own: `python -m tests.support.vllm_process JOBS.pickle ANSWERS.json`.

A vLLM plugin is loaded once a process, so stock vLLM and the plugin need one each; a process serves one model after
another. `answers` starts it.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.vllm_env import ROOT, environment


@dataclass
class Job:
    """A model, and requests {"prompt", "images" (arrays), "video" (array of frames)} that are answered together,
    `rounds` times over, so that later rounds find their prompts in vLLM's caches. `pillow`: the stock processor uses
    its Pillow backend, whose tiles equal ours to the bit; torchvision's, its default, differ by up to two levels."""

    model: str
    requests: list[dict]
    tokens: int = 16
    rounds: int = 1
    pillow: bool = True
    options: dict = field(default_factory=dict)


class Answers(NamedTuple):
    """A job's tokens of each request of each round, and the module of the model's class."""

    rounds: list[list[list[int]]]
    served_by: str


def answers(jobs: list[Job], plugin: bool, folder: Path, timeout: float = 900) -> tuple[list[Answers], str]:
    """(each job's, what the processes wrote to stderr)."""
    given, made = folder / f"jobs{int(plugin)}.pickle", folder / f"answers{int(plugin)}.json"
    given.write_bytes(pickle.dumps(jobs))
    command = [sys.executable, "-m", "tests.support.vllm_process", str(given), str(made)]
    env = environment(plugin, folder / "cache")
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-20000:]}")
    return [Answers(**job) for job in json.loads(made.read_text())], done.stderr


def _prompt(request: dict) -> dict:
    from PIL import Image

    shown = {}
    if request.get("images"):
        shown["image"] = [Image.fromarray(image) for image in request["images"]]
    if request.get("video") is not None:
        shown["video"] = [request["video"]]
    return {"prompt": request["prompt"], "multi_modal_data": shown} if shown else {"prompt": request["prompt"]}


def _use_pillow() -> None:
    """transformers' AutoImageProcessor takes its Pillow backend."""
    from transformers import AutoImageProcessor

    whole = AutoImageProcessor.from_pretrained.__func__

    def from_pretrained(cls, *args, **kwargs):
        return whole(cls, *args, **{**kwargs, "backend": "pil"})

    AutoImageProcessor.from_pretrained = classmethod(from_pretrained)


def main(given: str, made: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.multimodal import MULTIMODAL_REGISTRY

    jobs: list[Job] = pickle.loads(Path(given).read_bytes())
    if jobs[0].pillow:
        _use_pillow()
    found = []
    for job in jobs:
        most = {"image": 4, "video": 1}
        options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8} | job.options
        llm = LLM(job.model, limit_mm_per_prompt=most, disable_log_stats=True, **options)
        sampling = SamplingParams(temperature=0, max_tokens=job.tokens, ignore_eos=True, detokenize=False)
        prompts = [_prompt(request) for request in job.requests]
        rounds = []
        for _ in range(job.rounds):
            out = llm.generate(prompts, sampling, use_tqdm=False)
            rounds.append([list(each.outputs[0].token_ids) for each in out])
        kind = MULTIMODAL_REGISTRY._get_model_cls(llm.model_config)
        found.append({"rounds": rounds, "served_by": kind.__module__})
        llm.llm_engine.engine_core.shutdown()
        del llm
    Path(made).write_text(json.dumps(found))


if __name__ == "__main__":
    sys.modules["tests.support.vllm_process"] = sys.modules["__main__"]  # where the pickle finds Job
    main(*sys.argv[1:])
