"""Measure every op on this GPU against float64, against unfused PyTorch, and against its floor; write one JSON.

python -m benchmarks.gpu_check --output gpu.json            # on a GPU; benchmarks/gpu_check.sh runs it after the tests
python -m benchmarks.gpu_check --output x.json --dry-run    # anywhere: tiny sizes in Triton's interpreter, no times

An op may become the default on CUDA only if a committed result says "right" and "faster" for it.
"""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from benchmarks import machine
from benchmarks.image_cases import image_tiles_from_host
from benchmarks.op_cases import OpCase, Widths, cases
from benchmarks.tune import milliseconds, relative
from llava_fast.ops import triton_support, use_backend

TILES = (1, 5, 40)
TINY = Widths(vision=32, mlp=48, decoder=48, tile=28, patch=14, vocabulary=100)
WORST = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def measure(case: OpCase, dtype: torch.dtype, ceilings: machine.Ceilings | None) -> dict:
    """One case as a row: errors against float64 (the kernel's and plain PyTorch's), and with ceilings the times."""
    exact = case.exact()
    row: dict = {"op": case.op, "label": case.label, "dtype": str(dtype).removeprefix("torch."), "rows": case.rows}
    row["backend"] = case.backend
    with use_backend(case.backend):
        row["error"] = relative(case.run(), exact)
    row["plain_error"] = relative(case.plain(), exact) if case.comparable else None
    usual = max(2 * row["plain_error"], WORST[dtype] / 10) if case.comparable else WORST[dtype]
    row["right"] = row["error"] <= (usual if case.limit is None else case.limit)
    if ceilings and row["right"]:  # a wrong result gets no time
        with use_backend(case.backend):
            row["ms"] = milliseconds(case.run)
        with use_backend("reference"):
            row["reference_ms"] = milliseconds(case.run)
        row["plain_ms"] = milliseconds(case.plain)
        floor = max(case.flops / ceilings.flops_per_second, case.bytes / ceilings.bytes_per_second)
        row["floor_ms"] = 1e3 * floor
        row["share_of_floor"] = row["floor_ms"] / row["ms"]
        row["faster"] = case.backend != "reference" and row["ms"] < min(row["plain_ms"], row["reference_ms"])
    return row


def install_tables(folder: Path) -> None:
    """Use the freshly tuned tables from here on (they are copied into the package's own folder)."""
    target = Path(triton_support.__file__).parent / "tuned"
    for kind in triton_support.KINDS:
        made = folder / f"{kind.lower()}.json"
        if made.is_file():
            shutil.copy2(made, target / made.name)
    triton_support.table.cache_clear()
    triton_support._entry.cache_clear()


def test_counts(report: Path) -> dict[str, int]:
    """Tests, failures, errors and skips of a JUnit file."""
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}


def line(row: dict) -> str:
    """One row for a terminal."""
    text = f"{row['op']:24} {row['label']:18} {row['dtype']:9} error {row['error']:.1e}"
    if row["plain_error"] is not None:
        text += f" (plain {row['plain_error']:.1e})"
    if "ms" in row:
        text += f" {row['ms']:9.4f} ms, plain {row['plain_ms']:9.4f} ms, floor share {row['share_of_floor']:.2f}"
    return text


def main(
    output: Annotated[Path, typer.Option(help="The JSON to write.")],
    tables: Annotated[Path | None, typer.Option(help="A folder with freshly tuned tables to use.")] = None,
    tests: Annotated[Path | None, typer.Option(help="JUnit results of the tests on this GPU, to be kept.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Tiny sizes on the CPU, no times: does the script hold?")] = False,
) -> None:
    """Measure every op and write the results."""
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA GPU is usable here; --dry-run checks the script itself")
    device = "cpu" if dry_run else "cuda"
    if tables:
        install_tables(tables)
    ceilings = None if dry_run else machine.measure_ceilings("cuda", torch.bfloat16)
    rows: list[dict] = []
    result = {
        "machine": machine.describe(device, torch.get_num_threads()),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "ceilings": machine.as_dict(ceilings) if ceilings else None,
        "tests": test_counts(tests) if tests and tests.is_file() else None,
        "ops": rows,
    }
    sizes = [(1, torch.float32)] if dry_run else [*((tiles, torch.bfloat16) for tiles in TILES), (5, torch.float16)]
    for tiles, dtype in tqdm(sizes, desc="measuring", unit="size"):
        widths = TINY if dry_run else Widths()
        for case in cases(tiles, dtype, device, widths, also=(image_tiles_from_host,)):
            rows.append(measure(case, dtype, ceilings))
            print(line(rows[-1]), flush=True)
            output.write_text(json.dumps(result, indent=1) + "\n")  # each time: a run cut short keeps what it has
    if not all(row["right"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
