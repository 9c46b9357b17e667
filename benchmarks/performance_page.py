"""Write docs/performance.md: what each op must cost at LLaVA-NeXT 7B's sizes, and what was measured on GPUs and CPUs.

python -m benchmarks.performance_page
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer

from benchmarks.machine import ROOT, Ceilings
from benchmarks.op_cases import OpCase, Widths, cases
from benchmarks.report import read_json
from benchmarks.suites import SUITES

TILES = (1, 5, 40)
DATASHEETS = {"A100": Ceilings(2.039e12, 312e12), "H200": Ceilings(4.8e12, 989e12)}
"""NVIDIA's datasheets: A100 80GB SXM, H200 SXM; memory bytes a second, dense bf16 operations a second."""


def floor_seconds(case: OpCase, ceilings: Ceilings) -> float:
    return max(case.flops / ceilings.flops_per_second, case.bytes / ceilings.bytes_per_second)


def floors() -> list[str]:
    """The table of floors, in Markdown."""
    lines = [
        "| op | image of | GFLOP | MB | A100, µs | bound by | H200, µs | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tiles in TILES:
        for case in cases(tiles, torch.bfloat16, "meta", Widths()):
            cells = [case.op, case.label, f"{case.flops / 1e9:.1f}", f"{case.bytes / 1e6:.1f}"]
            for ceilings in DATASHEETS.values():
                arithmetic = case.flops / ceilings.flops_per_second > case.bytes / ceilings.bytes_per_second
                cells += [f"{1e6 * floor_seconds(case, ceilings):.1f}", "arithmetic" if arithmetic else "memory"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def measured(results: list[Path]) -> list[str]:
    """What the committed GPU results say, or that there are none."""
    if not results:
        return [
            "**No GPU has been measured.** The kernels are checked in Triton's interpreter and compiled for sm_80 and",
            "sm_90 ([kernels.md](kernels.md)); not one has run on a GPU, so no share of these floors is known, and",
            "every op runs its plain PyTorch reference on CUDA unless a kernel is asked for",
            "(`LLAVA_FAST_BACKEND=triton`). `benchmarks/gpu_check.sh` measures all of it in one command.",
        ]
    lines = []
    for path in results:
        result = json.loads(path.read_text())
        kind, commit = result["machine"]["kind"], result["commit"]
        lines += [f"### {kind} ([{path.name}](../benchmarks/results/{path.name}), commit {commit})", ""]
        lines += [
            "| op | image of | dtype | ms | PyTorch, ms | share of the measured floor |",
            "|---|---|---|---|---|---|",
        ]
        for row in result["ops"]:
            numbers = [f"{row[name]:.4f}" for name in ("ms", "plain_ms")] + [f"{row['share_of_floor']:.2f}"]
            lines.append("| " + " | ".join([row["op"], row["label"], row["dtype"], *numbers]) + " |")
        lines.append("")
    return lines


def measured_on_cpus(results: list[Path]) -> list[str]:
    """A table for each model of each result file, and what its suite says of it."""
    lines = [
        "A transformers model and its processor, stock and accelerated; the loss alone; packing. Weights are random,",
        "float32. What each suite times and how it counts memory: [benchmarks](../benchmarks/README.md).",
        "",
    ]
    for path in results:
        every = read_json(path)
        for model in dict.fromkeys(row.model for row in every):
            rows = [row for row in every if row.model == model]
            row, commits = rows[0], ", ".join(dict.fromkeys(str(each.commit) for each in rows))
            lines += [
                f"### {row.suite}: {model}",
                "",
                f"{row.machine['cpu']}, {row.machine['threads']} of {row.machine['cores']} cores, torch "
                f"{row.versions['torch']}, transformers {row.versions['transformers']}, commit {commits} "
                f"([{path.name}](../benchmarks/results/{path.name})).",
                "",
                "| case | side | ms | processor time, ms | peak, MiB | times as fast |",
                "|---|---|---|---|---|---|",
            ]
            for before, each in zip([None, *rows], rows, strict=False):
                case = "" if before and before.case == each.case else each.case
                cpu = "" if each.cpu is None else f"{1e3 * each.cpu:.4g}"
                peak = "" if each.peak_memory_bytes is None else f"{each.peak_memory_bytes / 2**20:.0f}"
                ratio = "" if each.ratio is None else f"{each.ratio:.2f}{' (disturbed)' * each.disturbed}"
                lines.append(f"| {case} | {each.backend} | {1e3 * each.median:.4g} | {cpu} | {peak} | {ratio} |")
            lines += ["", "```", SUITES[row.suite].summary(rows), "```", ""]
    return lines


def page(results: list[Path], on_cpus: list[Path]) -> str:
    widths = Widths()
    text = [
        "# Performance: what was measured, and floors",
        "",
        "Made by `python -m benchmarks.performance_page` from `benchmarks/results/` and `benchmarks/op_cases.py`.",
        "",
        "## On GPUs",
        "",
        *measured(results),
        "",
        "## On CPUs",
        "",
        *measured_on_cpus(on_cpus),
        "",
        "## Floors",
        "",
        "The least time each op can take for one image of LLaVA-NeXT 7B in bfloat16: the larger of its operations over",
        "the machine's rate and its least bytes (each input read once, each output written once) over its bandwidth.",
        "A `_backward` row is both passes. Widths: tower "
        + f"{widths.vision}, its MLP {widths.mlp}, decoder {widths.decoder}.",
        "Rates are the datasheets' (A100 80GB SXM: 312 TFLOP/s, 2.04 TB/s; H200 SXM: 989 TFLOP/s, 4.8 TB/s), which no",
        "real kernel reaches; the GPU check compares with the machine's own measured ceilings instead.",
        "",
        *floors(),
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    """Write docs/performance.md."""
    results = ROOT / "benchmarks" / "results"
    on_cpus = [
        path for suite in ("accelerate", "loss", "packing") for path in sorted(results.glob(f"*-cpu-*-{suite}.json"))
    ]
    (ROOT / "docs" / "performance.md").write_text(page(sorted(results.glob("*-ops.json")), on_cpus))


if __name__ == "__main__":
    typer.run(main)
