"""What a request costs the host on a GPU: kernels, graphs and copies launched, and time, of an image's prompt and of
each decoded token. Counted by torch.profiler, which sees a captured graph as one launch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from llava_fast.generation.llava import Llava
from llava_fast.generation.prompt import read_prompt
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import new_sequence
from llava_fast.models.decode_graphs import DecodeGraphs
from llava_fast.models.encode_graphs import EncodeGraphs

KERNELS = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
KINDS = {**dict.fromkeys(KERNELS, "kernels"), "cudaGraphLaunch": "graphs", "cudaMemcpyAsync": "copies"}
STEPS = 32
PICTURE = (672, 672)


def counted(work: Callable[[], Any], on_gpu: bool) -> dict[str, int]:
    """Launches of each kind while `work` runs; none without a GPU."""
    found = dict.fromkeys(("kernels", "graphs", "copies"), 0)
    if not on_gpu:
        work()
        return found
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    for event in seen.key_averages():
        if event.key in KINDS:
            found[KINDS[event.key]] += event.count
    return found


def of_request(model: Llava, **sampling: Any) -> dict[str, dict]:
    """{"prompt": from the picture to the first token, "token": the mean of STEPS steps}: launches, and `ms` timed
    without the profiler. Each call is made three times before, so that graphs are captured."""
    on_gpu = model.device.type == "cuda"
    picture = np.random.default_rng(0).integers(0, 256, (*PICTURE, 3), dtype=np.uint8)
    prompt = read_prompt(model.own_processor, {"prompt": "<image>\nWhat is this?", "images": [picture]})
    runner = Runner(model)
    options = Sampling(max_new_tokens=STEPS + 8, ignore_eos=True, seed=0, **sampling)
    measured: dict[str, dict] = {}

    def run(wrapped: Callable[[Callable[[], Any]], Any]) -> list[Any]:
        scheduler, sequence = Scheduler(runner), new_sequence(model, prompt, options)
        scheduler.add(sequence)
        first = wrapped(scheduler.step)
        for _ in range(3):
            scheduler.step()
        rest = wrapped(lambda: [scheduler.step() for _ in range(STEPS)])
        scheduler.cancel(sequence)
        return [first, rest]

    def timed(work: Callable[[], Any]) -> float:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    for _ in range(3):
        run(lambda work: work())
    launches, times = run(lambda work: counted(work, on_gpu)), run(timed)
    for name, number, count in (("prompt", 0, 1), ("token", 1, STEPS)):
        each = {kind: total / count for kind, total in launches[number].items()}
        measured[name] = {**each, "ms": times[number] / count}
    graphs = {"encode": runner.encoder, "decode": runner.device and runner.device.graphs}
    return measured | {"without_graphs": {name: each and why_none(each) for name, each in graphs.items()}}


def why_none(graphs: EncodeGraphs | DecodeGraphs) -> str | None:
    """Why some or all calls run without a graph; None if none does."""
    return graphs.unfit or "; ".join(dict.fromkeys(graphs.failed.values())) or None
