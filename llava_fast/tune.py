"""`llava-fast tune`: finds verdicts for a model's calls ahead of time, so that later runs spend no time on tests."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

from llava_fast.api import load
from llava_fast.demo.run import model_path
from llava_fast.errors import BackendError
from llava_fast.ops.selection import store, tables
from llava_fast.ops.selection.verdict import Verdict

if TYPE_CHECKING:
    from llava_fast.generation.llava import Llava

SIZES = ((336, 336), (672, 672), (336, 1008))  # heights and widths: one tile to five
GRAPHS_ON = ("cuda",)
TOKENS = 4  # per answer: the first comes from the prefill, the others from decoding steps


def tune(
    model: str | Path | None,
    training: bool,
    budget: float,
    device: str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    quantize: str | None = None,
) -> None:
    """Run a model (default: the demo's) on images of several sizes, test each class of calls that occurs, write the
    verdicts to this machine's file and print them. Raises BackendError if selection is off or pinned.
    """
    _check_settings()
    loaded = load(model or model_path(), device=device, dtype=dtype, precision=precision, quantize=quantize)
    prove(loaded, training, budget)


def _check_settings() -> None:
    settings = tables.settings()
    if settings.pinned is not None or settings.mode == "off":
        raise BackendError("tune finds verdicts: unset LLAVA_FAST_SELECTION, and LLAVA_FAST_SELECT if it is 'off'")


def prove(llava: Llava, training: bool, budget: float) -> None:
    """As `tune`, for a model that is loaded."""
    _check_settings()
    settings = tables.settings()
    settings.mode, settings.budget, settings.thorough = "first-use", math.inf, True
    table = settings.table(next(llava.parameters()).device)
    known = {name for name, verdict in table.verdicts.items() if verdict.by == "tune"}
    met: set[str] = set()
    settings.met = met
    workload(llava, training, graphs=False)
    settings.met, settings.budget = None, budget
    started = time.perf_counter()
    with tqdm(total=len(met), desc="proving", unit="class", disable=not met) as bar:
        settings.heard = lambda name, verdict: bar.update(name in met)
        if met:
            workload(llava, training, graphs=False)
        if llava.device.type in GRAPHS_ON and llava.cuda_graphs:
            for _ in range(2):  # a bucket's graph is captured at its second use; its warm-up runs the padded calls
                workload(llava, training=False, graphs=True)
    console = Console()
    used = sorted(set(table.classes.values()) & table.verdicts.keys())
    console.print(verdict_table({name: table.verdicts[name] for name in used}))
    found = sum(table.verdicts[name].by == "tune" for name in used if name not in known)
    console.print(f"{found} found in {time.perf_counter() - started:.1f} s, {len(known & set(used))} known before")
    left = sum(name not in table.verdicts or table.verdicts[name].by != "tune" for name in met)
    if left:
        console.print(f"{left} not tested: the budget of {budget:g} s is spent, or their values could not be used")
    console.print(f"kept in {store.path_of(table.machine)}", soft_wrap=True)


def workload(model: Llava, training: bool, graphs: bool = False) -> None:
    """Run generation for one request and for several, with CUDA graphs if `graphs`, and a training step if `training`
    is set."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    requests = [_talk("<image>\nWhat is in this picture?", images=[picture]) for picture in pictures]
    before, model.cuda_graphs = model.cuda_graphs, graphs
    try:
        for given in (*([request] for request in requests), [*requests, _talk("What is a picture?")]):
            model.generate(given, max_new_tokens=TOKENS, ignore_eos=True)
    finally:
        model.cuda_graphs = before
    if training:
        answered = [{**each, "messages": [*each["messages"], _turn("assistant", "A picture.")]} for each in requests]
        with torch.enable_grad():
            model(model.prepare(answered, labels=True, layout="packed"), logits="none").loss.backward()
        model.zero_grad()


def _talk(question: str, **visual: list[np.ndarray]) -> dict[str, Any]:
    return {"messages": [_turn("user", question)], **visual}


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def verdict_table(verdicts: Mapping[str, Verdict]) -> Table:
    """A table with one row per class: the chosen backend, its error and time next to the reference's, and the date of
    the verdict.
    """
    table = Table(Column("class of calls", overflow="fold"), title="verdicts")
    for heading in ("runs", "error", "ms", "found"):
        table.add_column(heading, overflow="fold")
    for name, verdict in verdicts.items():
        table.add_row(name, *verdict.columns())
    return table
