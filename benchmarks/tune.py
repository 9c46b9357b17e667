"""Tune the launch configuration of every Triton kernel on this GPU and write the table that the package ships.

python -m benchmarks.tune --output-dir llava_fast/ops/tuned

Each candidate must produce a correct result before it is timed. Times are medians of CUDA-graph replays on the same
inputs. Inputs of 40 tiles are larger than any cache, and inputs of 1 and 5 tiles may be cached, as after a preceding
op. A kernel without a correct candidate is reported and keeps its shipped configuration. The table is named after the
GPU (a100, h100, h200) and lists what selection tries first on such a GPU (llava_fast/ops/triton_support.py). Users
tune their own machine with `llava-fast tune`.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from benchmarks.op_cases import MAKERS, OpCase, Widths, made
from llava_fast.ops import triton_support, use_backend
from llava_fast.ops.selection.candidates import configurations
from llava_fast.ops.triton_support import Config

TILES = (5, 40, 1)  # the most important size (a 672x672 image) first, in case of interruption
CANDIDATES: dict[str, list[Config]] = configurations()


def milliseconds(work) -> float:
    """Return the median GPU time of one call without launch gaps, from ten replays of a graph of about 10 ms."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(work, rep=10, return_mode="median")


def waits(work) -> bool:
    """Return whether `work` synchronises the host with the GPU. It then cannot be captured in a CUDA graph, and a
    failed capture leaves PyTorch's random generator unusable."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def wall_milliseconds(work, calls: int = 30) -> float:
    """Return the median wall-clock time of one call until the GPU has finished."""
    for _ in range(3):
        work()
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def said(error: Exception) -> str:
    """Format an exception as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return ||found - exact|| / ||exact||, or infinity if it is NaN."""
    error = ((found.double() - exact.double()).norm() / exact.double().norm()).item()
    return error if error == error else float("inf")


def timings(case: OpCase, kernel: str, candidates: list[Config], limit: float) -> dict[int, float]:
    """Return {index of each correct candidate: its milliseconds}."""
    exact = case.exact()
    found: dict[int, float] = {}
    for number, candidate in enumerate(candidates):
        with triton_support.forced({kernel: candidate}), use_backend("triton"):
            try:
                if relative(case.run(), exact) <= limit:
                    found[number] = milliseconds(case.run)
            except Exception as error:  # e.g. a configuration that does not fit this GPU
                print(f"{kernel} {candidate}: {said(error)}")
    return found


def tune(dtype: torch.dtype, limit: float, path: Path, device: str = "cuda", widths: Widths | None = None) -> list[str]:
    """Tune all kernels and write {kernel: table entries} after each case, so that an interrupted run keeps its results.
    Returns descriptions of what could not be tuned."""
    measured: dict[tuple[str, int], list[dict[int, float]]] = {}
    failed: list[str] = []
    for tiles in tqdm(TILES, desc="tuning", unit="size"):
        for make in MAKERS:
            try:
                case = made(make, tiles, dtype, device, widths or Widths())
                for kernel in case.kernels:
                    found = timings(case, kernel, CANDIDATES[kernel], limit)
                    rows = 0 if tiles == min(TILES) else 1 << (case.rows.bit_length() - 1)
                    if found:
                        measured.setdefault((kernel, rows), []).append(found)
                    else:
                        failed.append(f"{kernel}: no candidate gives the right answer for {case.op}, {case.label}")
            except Exception as error:
                failed.append(f"{make.__name__}, {tiles} tiles: {said(error)}")
            write_table(best_entries(measured), path)
    return failed


def best_entries(measured: dict[tuple[str, int], list[dict[int, float]]]) -> dict[str, list[dict]]:
    """Return {kernel: entries in ascending order of rows}. If ops share a kernel, the candidate that is fastest over
    all of them is chosen. Adjacent equal entries are merged."""
    entries: dict[str, list[dict]] = {}
    for (kernel, rows), parts in sorted(measured.items()):
        right = set.intersection(*(set(part) for part in parts)) or set(parts[0])
        total = {number: sum(part.get(number, 0.0) for part in parts) for number in right}
        best = min(total, key=lambda number: total[number])
        entry = {"rows": rows, "config": CANDIDATES[kernel][best], "ms": round(total[best], 5)}
        if not entries.get(kernel) or entries[kernel][-1]["config"] != entry["config"]:
            entries.setdefault(kernel, []).append(entry)
    return entries


def write_table(entries: dict[str, list[dict]], path: Path) -> None:
    """Format the table with one kernel per line, for readable diffs."""
    lines = [f" {json.dumps(kernel)}: {json.dumps(each)}" for kernel, each in sorted(entries.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def compile_all(share: int, shares: int, shipped: bool) -> None:
    """Run every `shares`-th candidate once to fill the compiler's disk cache before the timing, or the shipped
    configurations of every `shares`-th op in all measured dtypes."""
    work = []
    for number, make in enumerate(MAKERS):
        if shipped and number % shares == share:
            work += [(make, dtype, {}) for dtype in (torch.bfloat16, torch.float16)]
        elif not shipped:
            with contextlib.suppress(Exception):
                kernels = made(make, 1, torch.bfloat16, "meta", Widths()).kernels
                work += [(make, torch.bfloat16, {name: each}) for name in kernels for each in CANDIDATES[name]]
    for make, dtype, configs in work if shipped else work[share::shares]:
        with triton_support.forced(configs), contextlib.suppress(Exception):
            case = made(make, 1, dtype, "cuda", Widths())
            with use_backend(case.backend):
                case.run()
    torch.cuda.synchronize()


def compile_in_parallel(shipped: bool) -> None:
    """Run `compile_all` in one process per core, since compilation needs no GPU."""
    processes = min(12, os.cpu_count() or 1)
    command = [sys.executable, "-m", "benchmarks.tune", *["--shipped"] * shipped, "--shares", str(processes), "--share"]
    for process in [subprocess.Popen([*command, str(number)]) for number in range(processes)]:
        process.wait()


def main(
    output_dir: Annotated[Path, typer.Option(help="Where <gpu>.json is written.")] = Path("llava_fast/ops/tuned"),
    share: Annotated[int, typer.Option(hidden=True)] = -1,
    shares: Annotated[int, typer.Option(hidden=True)] = 1,
    shipped: Annotated[bool, typer.Option("--shipped", hidden=True)] = False,
) -> None:
    """Tune every kernel in bfloat16 on this GPU and write its table."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("tuning needs a CUDA GPU, and none is usable here")
    if share >= 0:
        compile_all(share, shares, shipped)
        return
    compile_in_parallel(shipped=False)
    kind = triton_support.device_kind(torch.device("cuda"))
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"{kind if kind != 'default' else 'other'}.json"
    failed = tune(torch.bfloat16, 1e-2, path)
    print(f"wrote {path}", *failed, sep="\n")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
