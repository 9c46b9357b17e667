"""Write docs/performance.md: what each op must cost at LLaVA-NeXT 7B's sizes, and what was measured on GPUs and CPUs.

python -m benchmarks.performance_page
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
import typer

from benchmarks.machine import ROOT, Ceilings
from benchmarks.op_cases import OpCase, Widths, cases
from benchmarks.report import read_json
from benchmarks.suites import SUITES

TILES = (1, 5, 40)
OP_TIMES = ("ms", "plain_ms", "bare_ms", "reference_ms", "copy_ms")
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
            "sm_90 ([kernels.md](kernels.md)); none has run on a GPU, so no share of these floors is known. A kernel",
            "is used only after the machine has verified and timed it ([selection.md](selection.md)), or if it is",
            "requested by name (`LLAVA_FAST_BACKEND=triton`). `benchmarks/gpu_check.sh` measures everything in one",
            "command.",
        ]
    lines = []
    for path in results:
        result = json.loads(path.read_text())
        kind, commit = result["machine"]["kind"], result["commit"]
        versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "triton", "transformers"))
        lines += [f"### {kind} ([{path.name}](../benchmarks/results/{path.name}), commit {commit})", ""]
        lines += [f"{versions}, CUDA {result['versions']['cuda']}. {_tests(result.get('tests'))}", ""]
        if steps := result.get("steps"):
            lines += [f"Steps of the check: {'; '.join(f'{name} {how}' for name, how in steps.items())}.", ""]
        lines += ["#### Targets", "", "| target | measured | |", "|---|---|---|"]
        lines += [f"| {asked} | {found} | {verdict} |" for asked, found, verdict in targets(result)]
        lines += ["", *_path_table(result), *_op_table(result)]
    return lines


Target = tuple[str, str, str]
"""What is asked, what was measured, and "reached", "MISSED" or "not measured"."""


def targets(result: dict) -> list[Target]:
    """What issue 3 asks of a GPU, beside what a result of benchmarks/gpu_check.sh says. A target over several sizes is
    reached if every one of them reaches it."""
    overhead = 1.15 if "A100" in result["machine"]["kind"] else 1.25
    torchvision = any("bare_ms" in row for row in _rows(result, "image_tiles_from_host"))
    processor = "transformers' torchvision processor" if torchvision else "torch's antialiased bicubic (no torchvision)"
    eager, compiled = (_path(result, *names) for names in (("path", "hf-eager"), ("path-compiled", "hf-compile")))
    return [
        _least(
            f"host uint8 image to tiles: at least 5 times as fast as {processor}",
            5,
            _ratios(_rows(result, "image_tiles_from_host"), "bare_ms" if torchvision else "plain_ms"),
        ),
        _least("tiles to inputs_embeds: at least 2 times as fast as transformers", 2, _speed_up(eager)),
        _least("the same: at least 1.15 times as fast as transformers compiled", 1.15, _speed_up(compiled)),
        _most(
            f"projector and placement: at most {overhead} times the two bare products",
            overhead,
            {
                size: 1 / ratio if ratio else float("inf")
                for size, ratio in _ratios(_rows(result, "assemble_inputs"), "bare_ms").items()
            },
        ),
        _least("token_pack, 40 tiles: at least 0.85 of a copy's speed", 0.85, _best_of_forms(result)),
        _least(
            "LayerNorm with residual add, 40 tiles: at least 0.85 of a copy's speed",
            0.85,
            _ratios(_rows(result, "layer_norm", tiles=40), "copy_ms"),
        ),
        _least(
            "patch_embed from uint8 tiles: faster than normalising and convolving",
            1,
            _ratios(_rows(result, "patch_embed"), "plain_ms"),
        ),
        _most("peak memory of the path above the weights: at most half of transformers'", 0.5, _peak(eager)),
    ]


def _rows(result: dict, case: str, tiles: int | None = None) -> list[dict]:
    """The bfloat16 rows of a case of op_cases, smallest size first."""
    rows = [row for row in result.get("ops", []) if row["case"] == case and row["dtype"] == "bfloat16"]
    return sorted((row for row in rows if tiles in (None, row["tiles"])), key=lambda row: row["tiles"])


def _ratios(rows: list[dict], other: str) -> dict[str, float]:
    """Size -> how many times as fast as `other` the op is: 0 where it was wrong or raised."""
    found = {}
    for row in rows:
        if not row["right"] or ("exception" in row and "ms" not in row):
            found[f"{row['tiles']} tiles"] = 0.0
        elif "ms" in row and other in row:
            found[f"{row['tiles']} tiles"] = row[other] / row["ms"]
    return found


def _best_of_forms(result: dict) -> dict[str, float]:
    """token_pack's two forms: the faster is to be the default."""
    forms = {"Triton": "token_pack", "CUDA": "token_pack_native"}
    found = {name: _ratios(_rows(result, op, tiles=40), "copy_ms") for name, op in forms.items()}
    shares = {f"{size}, {name}": share for name, each in found.items() for size, share in each.items()}
    best = max(shares, key=lambda form: shares[form], default=None)
    return {best: shares[best]} if best else {}


def _path(result: dict, name: str, other: str) -> tuple[dict, dict] | None:
    """llava_fast's row and the other side's of one measurement of the path."""
    rows = {row["backend"]: row for row in result.get("path", {}).get(name, [])}
    return (rows["llava_fast"], rows[other]) if {"llava_fast", other} <= rows.keys() else None


def _speed_up(rows: tuple[dict, dict] | None) -> dict[str, float]:
    if rows is None:
        return {}
    return {rows[0]["case"]: rows[1]["median"] / rows[0]["median"] if rows[0]["check"]["passed"] else 0.0}


def _peak(rows: tuple[dict, dict] | None) -> dict[str, float]:
    if rows is None or None in (peaks := [row["peak_memory_bytes"] for row in rows]):
        return {}
    return {rows[0]["case"]: peaks[0] / peaks[1] if rows[0]["check"]["passed"] else float("inf")}


def _least(asked: str, limit: float, found: dict[str, float]) -> Target:
    return asked, _said(found), _verdict(value >= limit for value in found.values())


def _most(asked: str, limit: float, found: dict[str, float]) -> Target:
    return asked, _said(found), _verdict(value <= limit for value in found.values())


def _said(found: dict[str, float]) -> str:
    wrong = (0.0, float("inf"))
    return "; ".join(
        f"{size}: {'wrong or failed' if value in wrong else f'{value:.2f}'}" for size, value in found.items()
    )


def _verdict(held: Iterable[bool]) -> str:
    held = list(held)
    return "not measured" if not held else "reached" if all(held) else "MISSED"


def _tests(counts: dict | None) -> str:
    if counts is None:
        return "The kernels' tests were not run there."
    wrong = counts["failures"] + counts["errors"]
    text = f"The kernels' tests there: {counts['tests']} run, {wrong} failed, {counts['skipped']} skipped."
    lost = counts["crashed"]
    return text + (f" Crashed or cut off: {', '.join(lost)}." if lost else "")


def _path_table(result: dict) -> list[str]:
    """Tiles to inputs_embeds: a line for each side of each measurement."""
    forms = dict.fromkeys(("path", "path-compiled", "path-graphs"), "Triton") | {"path-reference": "PyTorch references"}
    rows = [(name, row) for name in forms for row in result.get("path", {}).get(name, [])]
    if not rows:
        return []
    lines = [
        f"Uint8 tiles to `inputs_embeds`, LLaVA-NeXT 7B, {rows[0][1]['settings']['dtype']}: {rows[0][1]['case']}.",
        "",
        "| ops on | side | ms | peak, MiB | agrees |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows:
        peak = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:.0f}"
        check = "" if row["check"] is None else "yes" if row["check"]["passed"] else "NO"
        form = forms[name] if row["backend"].startswith("llava_fast") else ""
        lines.append(f"| {form} | {row['backend']} | {1e3 * row['median']:.3f} | {peak} | {check} |")
    return [*lines, ""]


def _op_table(result: dict) -> list[str]:
    """A line for each op; one without a time says why."""
    lines = [
        "PyTorch: the same, unfused. Bare: what a target names instead. Reference: the op's own, in PyTorch. Copy: as",
        "many bytes read and written. Share: of the floor at this machine's measured ceilings.",
        "",
        "| op | image of | form | dtype | ms | PyTorch | bare | reference | copy | share | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result.get("ops", []):
        times = [f"{row[name]:.4f}" if name in row else "" for name in OP_TIMES]
        share = f"{row['share_of_floor']:.2f}" if "share_of_floor" in row else ""
        said = [row["exception"].replace("|", "/")[:160]] if "exception" in row else []
        if not row["right"] and "error" in row:
            said.insert(0, f"WRONG: error {row['error']:.1e}")
        cells = [row["op"], row["label"], row.get("backend", ""), row["dtype"], *times, share, "; ".join(said)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


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
                (
                    f"{row.machine['cpu']}, {row.machine['threads']} of {row.machine['cores']} cores, torch "
                    f"{row.versions['torch']}, transformers {row.versions['transformers']}, commit {commits} "
                    f"([{path.name}](../benchmarks/results/{path.name}))."
                ),
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
        (
            "A `_backward` row is both passes. Widths: tower "
            f"{widths.vision}, its MLP {widths.mlp}, decoder {widths.decoder}."
        ),
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
    (ROOT / "docs" / "performance.md").write_text(page(sorted(results.glob("*-gpu.json")), on_cpus))


if __name__ == "__main__":
    typer.run(main)
