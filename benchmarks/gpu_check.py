"""Compare every op on this GPU with float64, unfused PyTorch and its lower bound, and merge results of gpu_check.sh.

python -m benchmarks.gpu_check measure --output ops.json            # on a GPU; gpu_check.sh runs it
python -m benchmarks.gpu_check measure --output x.json --dry-run    # anywhere: tiny sizes, no times
python -m benchmarks.gpu_check select --budget 120                  # verdicts for NeXT-7B, as `llava-fast tune`
python -m benchmarks.gpu_check launches --output launches.json      # launches and times of a prompt and a token
python -m benchmarks.gpu_check collect OUT_DIR                      # everything in OUT_DIR into OUT_DIR/gpu.json

These results do not decide which backend of an op runs. Selection does, on each machine (`llava-fast tune`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from benchmarks import machine
from benchmarks.launches import of_request
from benchmarks.op_cases import MAKERS, MEASURED_BESIDE, OpCase, Widths, made
from benchmarks.subject import Subject
from benchmarks.tune import compile_in_parallel, milliseconds, relative, said, waits, wall_milliseconds
from llava_fast.generation.llava import Llava
from llava_fast.models.fused import merge_linears
from llava_fast.ops import triton_support, use_backend
from llava_fast.tune import prove

TILES = (5, 40, 1)  # the most important size first (a 672x672 image), in case the run is interrupted
TINY = Widths(vision=32, mlp=48, decoder=48, tile=28, patch=14, vocabulary=100)
WORST = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SUITES = ("answer", "decode", "train-step")  # steps of gpu_check.sh that ran a suite, by how their names begin
VERDICTS = Path("verdicts", "selection")  # under the OUT_DIR of gpu_check.sh, whose LLAVA_FAST_CACHE is verdicts
TIMES = ("ms", "plain_ms", "bare_ms", "copy_ms", "reference_ms")

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


def measure(case: OpCase, dtype: torch.dtype, ceilings: machine.Ceilings | None) -> dict:
    """Measure one case: errors against float64 of the kernel and of plain PyTorch and, if ceilings are given, times.

    ms: the op. plain_ms, bare_ms: see OpCase. copy_ms: a copy of as many bytes as the op must read and write.
    reference_ms: the op's reference. "by_wall_clock" lists those that cannot be captured in a CUDA graph. An exception
    is recorded in "exception", and the measurement continues.
    """
    row: dict = {"op": case.op, "label": case.label, "dtype": str(dtype).removeprefix("torch."), "rows": case.rows}
    row |= {"backend": case.backend, "right": False, "plain_error": None}
    try:
        exact = case.exact()
        with use_backend(case.backend):
            row["error"] = relative(case.run(), exact)
        if case.comparable:
            row["plain_error"] = relative(case.plain(), exact)
    except Exception as error:
        return row | {"exception": said(error)}
    usual = max(2 * row["plain_error"], WORST[dtype] / 10) if case.comparable else WORST[dtype]
    row["right"] = row["error"] <= (usual if case.limit is None else case.limit)
    if ceilings and row["right"]:  # a wrong result gets no time
        del exact
        row |= times(case)
        row["floor_ms"] = 1e3 * max(case.flops / ceilings.flops_per_second, case.bytes / ceilings.bytes_per_second)
        if "ms" in row:
            row["share_of_floor"] = row["floor_ms"] / row["ms"]
            others = [row[name] for name in ("plain_ms", "reference_ms") if name in row]
            row["faster"] = case.backend != "reference" and "plain_ms" in row and row["ms"] < min(others)
    return row


def times(case: OpCase) -> dict:
    """Return milliseconds with the keys of TIMES, as far as the case defines them."""
    ways: dict[str, tuple[str, Callable[[], object] | None]] = {
        "ms": (case.backend, case.run),
        "plain_ms": ("auto", case.plain),
        "bare_ms": ("auto", case.bare),
        "copy_ms": ("auto", copy_of(case.bytes)),
        "reference_ms": ("reference", case.run),
    }
    row: dict = {"by_wall_clock": []}
    wrong = []
    for name, (backend, work) in ways.items():
        if work is None or (case.wall and name == "copy_ms"):
            continue
        try:
            with use_backend(backend):
                wall = case.wall or waits(work)
                row[name] = (wall_milliseconds if wall else milliseconds)(work)
                row["by_wall_clock"] += [name] * wall
        except Exception as error:
            wrong.append(f"{name}: {said(error)}")
    return row | ({"exception": "; ".join(wrong)} if wrong else {})


def copy_of(moved: float) -> Callable[[], object]:
    """Return a function that copies on the GPU. Reads and writes together are `moved` bytes."""

    @functools.cache
    def tensors() -> tuple[torch.Tensor, torch.Tensor]:
        source = torch.ones(max(1, int(moved) // 2), dtype=torch.uint8, device="cuda")
        return torch.empty_like(source), source

    def work() -> object:
        target, source = tensors()
        return target.copy_(source)

    return work


def use_tables(folder: Path) -> None:
    """Use the table written by benchmarks.tune in `folder` instead of the shipped one."""
    kind = triton_support.device_kind(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    path = folder / f"{kind if kind != 'default' else 'other'}.json"
    if not path.is_file():
        raise typer.BadParameter(f"there is no {path}: run benchmarks.tune first", param_hint="--tables")
    tuned, shipped = json.loads(path.read_text()), triton_support.table

    def table(asked: str) -> dict:
        return shipped(asked) | (tuned if asked == kind else {})

    triton_support.table = functools.cache(table)
    triton_support._entry.cache_clear()


def line(row: dict) -> str:
    """Format one row for the terminal."""
    text = f"{row['op']:24} {row['label']:18} {row['dtype']:9}"
    if "error" in row:
        text += f" error {row['error']:.1e}"
    if row.get("plain_error") is not None:
        text += f" (plain {row['plain_error']:.1e})"
    text += "".join(f" {name} {row[name]:.4f}" for name in TIMES if name in row)
    text += "" if row["right"] else " NOT RIGHT"
    return text + (f" {row['exception']}" if "exception" in row else "")


def context_is_lost() -> bool:
    """Return whether the CUDA context of this process is unusable after a kernel fault or a failed capture."""
    try:
        torch.cuda.synchronize()
        torch.randn(1, device="cuda").item()
    except Exception:
        return True
    return False


@app.command("measure")
def measure_ops(
    output: Annotated[Path, typer.Option(help="The JSON to write. Rows that it has are kept, not measured again.")],
    tables: Annotated[Path | None, typer.Option(help="A folder with freshly tuned tables to use.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Tiny sizes on the CPU, no times: does the script hold?")] = False,
) -> None:
    """Measure every op and write the results."""
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA GPU is usable here; --dry-run checks the script itself")
    device, widths = ("cpu", TINY) if dry_run else ("cuda", Widths())
    if tables:
        use_tables(tables)
    rows: list[dict] = json.loads(output.read_text())["ops"] if output.is_file() else []
    done = {(row["case"], row["tiles"], row["dtype"]) for row in rows}
    if not (dry_run or done or tables):
        compile_in_parallel(shipped=True)
    ceilings = None if dry_run else machine.measure_ceilings("cuda", torch.bfloat16)
    result = {"ceilings": machine.as_dict(ceilings) if ceilings else None, "ops": rows}
    sizes = [(1, torch.float32)] if dry_run else [*((tiles, torch.bfloat16) for tiles in TILES), (5, torch.float16)]
    for tiles, dtype in tqdm(sizes, desc="measuring", unit="size"):
        for make in (*MAKERS, *MEASURED_BESIDE):
            key = {"case": make.__name__, "tiles": tiles, "dtype": str(dtype).removeprefix("torch.")}
            if tuple(key.values()) in done:
                continue
            key["tables"] = "tuned" if tables else "shipped"
            try:
                row = measure(made(make, tiles, dtype, device, widths), dtype, ceilings)
            except Exception as error:
                row = {"op": make.__name__, "label": f"{tiles} tiles", "backend": OpCase.backend}
                row |= {"right": False, "exception": said(error)}
            rows.append(key | row)
            print(line(rows[-1]), flush=True)
            output.write_text(json.dumps(result, indent=1) + "\n")  # keeps results if interrupted
            if not dry_run and "exception" in row and context_is_lost():
                print("the GPU takes no more work from this process: going on in a fresh one", flush=True)
                os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_check", *sys.argv[1:]])
    if not all(row["right"] and "exception" not in row for row in rows):
        raise typer.Exit(1)


Shape = Annotated[str, typer.Option(help="A shape of benchmarks.shapes, with random weights.")]
Where = Annotated[str, typer.Option(help="cuda or cpu.")]


def loaded(model: str, device: str) -> Llava:
    """A shape's model as `load` gives it, Linears merged on CUDA, in bfloat16 there."""
    ours = Subject(model, None, torch.bfloat16 if device == "cuda" else torch.float32, device).ours
    if device == "cuda":
        merge_linears(ours)
    return ours


@app.command()
def select(
    model: Shape = "llava-next-7b",
    device: Where = "cuda",
    training: Annotated[bool, typer.Option(help="A training step's calls too.")] = True,
    budget: Annotated[float, typer.Option(help="Seconds that proofs may take.")] = 120.0,
) -> None:
    """Find verdicts for a shape's calls; they lie in LLAVA_FAST_CACHE."""
    prove(loaded(model, device).requires_grad_(training), training, budget)


@app.command()
def launches(
    output: Annotated[Path, typer.Option(help="The JSON to write.")],
    model: Shape = "llava-next-7b",
    device: Where = "cuda",
) -> None:
    """Count the launches of a prompt with an image and of a decoded token, greedy and drawn."""
    ours = loaded(model, device)
    ways = {"greedy": {}, "drawn": {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1}}
    found = {name: of_request(ours, **options) for name, options in ways.items()}
    output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def test_counts(folder: Path) -> dict:
    """Sum up the JUnit files of a folder: tests, failures, errors, skipped tests, names of failed tests, and test files
    without a JUnit file because pytest crashed or was killed (from `exits`, with lines "file status")."""
    counts: dict = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    counts |= {"failed": [], "crashed": []}
    for entry in (folder / "exits").read_text().splitlines():
        name, status = entry.rsplit(" ", 1)
        try:
            suite = next(ElementTree.parse(folder / f"{Path(name).stem}.xml").getroot().iter("testsuite"))
        except (OSError, ElementTree.ParseError, StopIteration):
            suite = None
        if suite is None or status not in ("0", "1"):
            counts["crashed"].append(f"{name} (exit status {status})")
        if suite is not None:
            for what in ("tests", "failures", "errors", "skipped"):
                counts[what] += int(suite.get(what, 0))
            bad = (
                case
                for case in suite.iter("testcase")
                if case.find("failure") is not None or case.find("error") is not None
            )
            counts["failed"] += [f"{name}::{case.get('name')}" for case in bad]
    counts["crashed"].sort()
    return counts


@app.command()
def restore(folder: Annotated[Path, typer.Argument(help="The OUT_DIR of gpu_check.sh.")]) -> None:
    """Put the verdicts of an earlier call, from FOLDER/gpu.json, back into their place unless there are some, if the
    commit is the same: so this call's steps run on them."""
    path, target = folder / "gpu.json", folder / VERDICTS
    before = json.loads(path.read_text()) if path.is_file() else {}
    if before.get("commit") != machine.commit():
        return
    for name, verdicts in before.get("verdicts", {}).items():
        target.mkdir(parents=True, exist_ok=True)
        if not (target / f"{name}.json").exists():
            (target / f"{name}.json").write_text(json.dumps(verdicts))


@app.command()
def collect(folder: Annotated[Path, typer.Argument(help="The OUT_DIR of gpu_check.sh.")]) -> None:
    """Merge the results of all steps into FOLDER/gpu.json. An existing file of the same commit is extended."""
    path = folder / "gpu.json"
    on_gpu = torch.cuda.is_available()
    versions = machine.versions() | {"triton": importlib.metadata.version("triton"), "cuda": torch.version.cuda}
    result: dict = {"commit": machine.commit()}
    if path.is_file():
        before = json.loads(path.read_text())
        if before["commit"] == result["commit"]:
            result = before
        else:
            path.rename(folder / f"gpu-{before['commit']}.json")
    result["machine"] = machine.describe("cuda" if on_gpu else "cpu", torch.get_num_threads())
    result["versions"] = versions
    rows = {(row["case"], row["tiles"], row["dtype"]): row for row in result.get("ops", [])}
    for name in ("ops", "ops-tuned"):  # a tuned row takes the place of the shipped configuration's
        if (folder / f"{name}.json").is_file():
            found = json.loads((folder / f"{name}.json").read_text())
            result["ceilings"] = found["ceilings"]
            rows |= {(row["case"], row["tiles"], row["dtype"]): row for row in found["ops"]}
    result["ops"] = list(rows.values())
    if (folder / "tests" / "exits").is_file():
        result["tests"] = test_counts(folder / "tests")
    for kind in ("path", *SUITES):
        for each in sorted(folder.glob(f"{kind}*.json")):
            section = result.setdefault("path" if kind == "path" else "suites", {})
            section[each.stem] = json.loads(each.read_text())["rows"]
    if (folder / "launches.json").is_file():
        result["launches"] = json.loads((folder / "launches.json").read_text())
    for each in sorted((folder / VERDICTS).glob("*.json")):
        result.setdefault("verdicts", {})[each.stem] = json.loads(each.read_text())
    if (folder / "steps").is_file():
        steps = (entry.split(": ", 1) for entry in (folder / "steps").read_text().splitlines())
        result["steps"] = result.get("steps", {}) | dict(steps)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    app()
