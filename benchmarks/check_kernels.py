"""Compile every shipped Triton configuration, every other one that selection may try (in bfloat16), and every CUDA
source for sm_80 and sm_90 without a GPU, and check them.

python -m benchmarks.check_kernels           # compile, print a summary, fail if a kernel got worse than in the table
python -m benchmarks.check_kernels --write   # also write benchmarks/kernels.json and docs/kernels.md
python -m benchmarks.check_kernels --changed # compile only what differs from the committed table in source or compiler

A kernel fails if it
- uses the stack (including register spills) or more shared memory than a block may have;
- computes a matrix product without matrix instructions, or with serialised ones (ptxas warns about such wgmma);
- uses tf32 that was not requested;
- needs more registers or shared memory than in the committed table, or a slower matrix instruction (mma instead of
  wgmma), or has a worse inner loop (benchmarks/inner_loops.py), or is missing from the table.

A row's `source` is Triton's hash of the compiled source, the options, the architecture and Triton's version (its wheel
contains ptxas). This script is not part of the hash. After a change of this script, write the table again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from benchmarks import inner_loops

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "benchmarks" / "kernels.json"
PAGE = ROOT / "docs" / "kernels.md"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have (CUDA programming guide, capabilities)
MATRIX = {80: ("mma.sync",), 90: ("wgmma.mma_async", "mma.sync")}
BOUNDS = ROOT / "docs" / "kernel_bounds.md"
COMPILED = ("registers", "stack", "shared", "matrix", "serial", "tf32", "loop")
REGISTER_SLACK = 8  # the granularity of register allocation; tolerated between compiler patch releases


def modules() -> list[str]:
    """Return the names of the modules with Triton kernels."""
    folder = ROOT / "llava_fast" / "ops"
    return sorted(f"llava_fast.ops.{path.parent.name}.{path.stem}" for path in folder.glob("*/triton_kernels.py"))


def compile_triton(module: str, index: int, known: dict[str, dict]) -> list[dict]:
    """Compile one specimen of a module in all its configurations for both architectures. `known` maps source hashes to
    rows that need no compilation."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llava_fast.ops.triton_support import OPTIONS

    specimen = import_module(module).specimens()[index]
    names = specimen.kernel.arg_names
    found = []
    for config, constants, options in specimen.compilations():
        signature = {name: specimen.signature.get(name, "constexpr") for name in names}
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in specimen.aligned}
        for capability in (80, 90):
            source = ASTSource(
                specimen.kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes
            )
            identity = f"{source.hash()} {sorted(options.items())} {capability} {triton.__version__}"
            identity = hashlib.sha256(identity.encode()).hexdigest()[:16]
            if identity not in known:
                every = OPTIONS | options
                made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=every)
                known = known | {identity: compiled(made, capability)}
            found.append(
                {
                    "op": specimen.op,
                    "kernel": specimen.kernel.__name__,
                    "label": specimen.label,
                    "config": config,
                    "sm": capability,
                    **{name: known[identity][name] for name in COMPILED},
                    "wants_matrix": specimen.matrix,
                    "wants_tf32": specimen.tf32,
                    "source": identity,
                }
            )
    return found


def compiled(made: Any, capability: int) -> dict:
    """Return the properties of a kernel compiled by Triton, with the keys of COMPILED."""
    ptx = made.asm["ptx"]
    usage = resource_usage(made.asm["cubin"])[0]
    matrix = next((m for m in MATRIX[capability] if m in ptx), "")
    return {
        "registers": usage["registers"],
        "stack": usage["stack"],
        "shared": made.metadata.shared,
        "matrix": matrix,
        "serial": is_serial(ptx, capability),
        "tf32": "tf32" in ptx,
        "loop": inner_loops.inner_loop(inner_loops.disassembled(made.asm["cubin"])) if matrix else None,
    }


def resource_usage(cubin: bytes) -> list[dict]:
    """Return the registers and stack bytes of each function of a cubin or object (disassembler of the Triton wheel)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return [
        {"function": name, "registers": int(registers), "stack": int(stack), "shared": int(shared)}
        for name, registers, stack, shared in re.findall(pattern, text)
    ]


def is_serial(ptx: str, capability: int) -> bool:
    """Return whether ptxas reports that it serialises the asynchronous matrix instructions of this PTX."""
    if "wgmma.mma_async" not in ptx:
        return False
    from triton.backends.nvidia.compiler import get_ptxas  # the wheel has two; which one, depends on its version

    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}a", source, "-o", made]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    return "instructions are serialized" in said.stdout + said.stderr


def compile_cuda(source: Path) -> list[dict]:
    """Compile one .cu file of csrc with the build's flags and return the resources of each kernel."""
    flags = re.search(r"NVCC_FLAGS = \[(.*?)\n\]", (ROOT / "setup.py").read_text(), re.DOTALL)[1]
    flags = [
        part
        for part in re.findall(r'"([^"]+)"', flags)
        if not part.startswith("-gencode") and part != "--cudart=static"
    ]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for capability in (80, 90):
            out = Path(folder) / "out.cubin"
            command = [
                "nvcc",
                *flags,
                f"-arch=sm_{capability}",
                "-cubin",
                f"-I{ROOT / 'csrc'}",
                str(source),
                "-o",
                str(out),
            ]
            subprocess.run(command, check=True)
            for usage in resource_usage(out.read_bytes()):
                name = subprocess.run(
                    ["c++filt", usage["function"]], capture_output=True, text=True, check=False
                ).stdout.strip()
                found.append(
                    {
                        "op": source.parent.name,
                        "kernel": re.sub(r"\(anonymous namespace\)::|llava_fast::|\(.*", "", name),
                        "label": source.name,
                        "config": {},
                        "sm": capability,
                        "registers": usage["registers"],
                        "stack": usage["stack"],
                        "shared": usage["shared"],
                        "matrix": "",
                        "serial": False,
                        "tf32": False,
                        "loop": None,
                        "wants_matrix": False,
                        "wants_tf32": False,
                        "source": "",
                    }
                )
    return found


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"release ([\d.]+)", text)[1]


def faults(row: dict, committed: dict | None) -> list[str]:
    """Return descriptions of the faults of one compiled kernel."""
    wrong = []
    if row["stack"]:
        wrong.append(f"{row['stack']} bytes of stack")
    if row["shared"] > SHARED_LIMIT[row["sm"]]:
        wrong.append(f"{row['shared']} bytes of shared memory, more than {SHARED_LIMIT[row['sm']]}")
    by_rank = (*MATRIX[row["sm"]], "")  # the fastest first
    if row["wants_matrix"] and not row["matrix"]:
        wrong.append("no matrix instruction")
    elif committed and by_rank.index(row["matrix"]) > by_rank.index(committed["matrix"]):
        wrong.append(f"{row['matrix'] or 'no matrix instruction'}, {committed['matrix']} committed")
    if row["serial"]:
        wrong.append("matrix instructions that wait for one another")
    if row["tf32"] and not row["wants_tf32"]:
        wrong.append("tf32 that was not asked for")
    if committed and row["registers"] > committed["registers"] + REGISTER_SLACK:
        wrong.append(f"{row['registers']} registers, {committed['registers']} committed")
    if committed and row["shared"] > committed["shared"]:
        wrong.append(f"{row['shared']} bytes of shared memory, {committed['shared']} committed")
    return wrong + inner_loops.faults(row.get("loop"), (committed or {}).get("loop"))


def judge(rows: list[dict], committed: list[dict] | None) -> list[str]:
    """Return one line for each kernel with faults. `committed` is the table to compare with, or None."""
    table = {key(row): row for row in committed or []}
    lines = []
    for row in rows:
        wrong = faults(row, table.get(key(row)))
        if committed is not None and key(row) not in table:
            wrong.append("not in the committed table (write it with --write)")
        if wrong:
            lines.append(
                f"{row['op']} {row['kernel']} ({row['label']}) {row['config']} sm_{row['sm']}: {'; '.join(wrong)}"
            )
    return lines


def cuda_sources(only: str = "", allow_missing_nvcc: bool = False) -> list[Path]:
    """Return the .cu files of csrc whose op's name contains `only`. Without nvcc: no files if that is allowed, else an
    error."""
    sources = [path for path in sorted((ROOT / "csrc").rglob("*.cu")) if only in path.parent.name]
    if not sources or shutil.which("nvcc"):
        return sources
    what = f"nvcc is not on PATH: {len(sources)} CUDA sources of csrc are not compiled"
    if not allow_missing_nvcc:
        raise typer.BadParameter(f"{what}; put nvcc 12 or 13 there, or pass --allow-missing-nvcc")
    print(what)
    return []


def key(row: dict) -> str:
    return json.dumps([row[name] for name in ("op", "kernel", "label", "config", "sm")])


def markdown(rows: list[dict], versions: str) -> str:
    """Return docs/kernels.md: the number of kernels per op and architecture and their maximum resources. The full list
    is benchmarks/kernels.json."""
    lines = [
        "# Compiled kernels",
        "",
        f"Made by `make check-kernels WRITE=1` with {versions}. Compiled, not run: nothing here is a speed.",
        "",
        "Registers, stack and shared memory are the largest of an op's kernels over configurations: those shipped, in",
        "all dtypes, and the others that selection may try, in bfloat16.",
        "[kernels.json](../benchmarks/kernels.json) lists every kernel.",
        "",
        "| op | sm | kernels | registers | stack | shared | matrix instructions | tf32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for op, sm in sorted({(row["op"], row["sm"]) for row in rows}):
        own = [row for row in rows if (row["op"], row["sm"]) == (op, sm)]
        most = [max(row[name] for row in own) for name in ("registers", "stack", "shared")]
        matrix = ", ".join(sorted({row["matrix"] for row in own} - {""})) or "-"
        cells = [op, sm, len(own), *most, matrix, "yes" if any(row["tf32"] for row in own) else "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def bounds_page(rows: list[dict], version: str) -> str:
    """A page of the documentation: what share of the matrix units' rate each configuration can reach at best,
    and how long what memory bounds takes at least."""
    from benchmarks import bandwidth_bounds  # which defines kernels, before main() has chosen to compile them

    lines = [
        "# What kernels can reach at best",
        "",
        "## What issue slots bound",
        "",
        f"Estimates, made by `make check-kernels WRITE=1` from the disassembly of Triton {version} and published",
        "rates: nothing here ran on a GPU. The inner loop of each kernel is read (`benchmarks/inner_loops.py`). The",
        "share is what its issue slots leave of the matrix units' dense rate, if memory never makes it wait and enough",
        "warps are resident. A kernel cannot be faster than this; it may be much slower. `blocks` is how many fit a",
        "multiprocessor by registers and shared memory. Of each configuration the least favourable dtype is shown;",
        "those that are not shipped, and that selection may try, are compiled in bfloat16 alone.",
        "",
        "| op | kernel | sm | configuration | matrix instruction | others | bytes | async | load | blocks | share |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    worst: dict[tuple, tuple[float, dict]] = {}
    for row in rows:
        if row.get("loop"):
            share = inner_loops.bound(row["loop"], row["sm"])
            where = row["op"], row["kernel"], row["sm"], json.dumps(row["config"])
            if where not in worst or share < worst[where][0]:
                worst[where] = share, row
    for (op, kernel, sm, config), (share, row) in sorted(worst.items()):
        loop, words = row["loop"], " ".join(f"{name}={value}" for name, value in json.loads(config).items())
        cells = [op, kernel, sm, words or "-", loop["shape"], f"{loop['others'] / loop['matrix']:.2f}", loop["bytes"]]
        cells += [loop["asyncs"], loop["narrowest"] or "-", blocks(row), f"{100 * share:.0f}%"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    note = "`others` and `bytes` (loaded from global memory by a warp, without TMA's) are for each matrix instruction; "
    lines += ["", note + "`async`: asynchronous copies in the loop; `load`: bytes of a thread's narrowest load."]
    lines += [
        "quantised_rows_kernel multiplies up to 16 rows: reading and widening codes bounds it, not the matrix units.",
        "",
    ]
    return "\n".join([*lines, *bandwidth_bounds.section()])


def blocks(row: dict) -> int:
    """Blocks of a kernel that fit a multiprocessor: by registers (65,536, given out 8 a thread), shared memory and
    threads."""
    threads = 32 * row["config"].get("num_warps", 4)
    registers = 65536 // (-(-row["registers"] // 8) * 8 * threads)
    shared = SHARED_LIMIT[row["sm"]] // row["shared"] if row["shared"] else 32
    return min(registers, shared, 2048 // threads, 32)


def main(
    write: Annotated[bool, typer.Option(help="Write the table instead of comparing with it.")] = False,
    changed: Annotated[
        bool,
        typer.Option(help="Compile only Triton kernels that differ from the committed table in source or compiler."),
    ] = False,
    jobs: Annotated[int, typer.Option(help="Number of parallel compilations.")] = os.cpu_count() or 1,
    only: Annotated[str, typer.Option(help="Only ops whose name contains this.")] = "",
    allow_missing_nvcc: Annotated[
        bool,
        typer.Option(help="Without nvcc, check only the Triton kernels instead of failing."),
    ] = False,
    quiet: Annotated[bool, typer.Option(help="Print only faults, no summary.")] = False,
) -> None:
    """Compile every shipped kernel for sm_80 and sm_90 and check it."""
    if write and (only or allow_missing_nvcc):
        raise typer.BadParameter("--write makes the whole table: leave out --only and --allow-missing-nvcc")
    sources = cuda_sources(only, allow_missing_nvcc)
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    work = [(name, i) for name in modules() if only in name for i in range(len(import_module(name).specimens()))]
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.is_file() else None
    complete = [row for row in committed or [] if row["source"] and ("loop" in row or not row["matrix"])]
    known = {row["source"]: {"loop": None, **row} for row in complete if changed}
    rows: list[dict] = []
    with ProcessPoolExecutor(jobs) as pool:
        started = [pool.submit(compile_triton, *item, known) for item in work] + [
            pool.submit(compile_cuda, p) for p in sources
        ]
        for future in tqdm(started, desc="compiling", unit="kernel"):
            rows += future.result()
    rows.sort(key=key)
    page = markdown(rows, f"Triton {triton.__version__}, {nvcc_version() if sources else 'no nvcc'}")
    if not quiet:
        print(page)
    wrong = judge(rows, None if write else committed)
    print(
        *wrong,
        f"{len(rows)} kernels of {len(work)} Triton specimens and {len(sources)} CUDA sources"
        + (
            f", {sum(row['source'] in known for row in rows)} of them known from the committed table" if changed else ""
        ),
        sep="\n",
    )
    if wrong:
        raise typer.Exit(1)
    if write:
        COMMITTED.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        PAGE.write_text(page)
        BOUNDS.write_text(bounds_page(rows, triton.__version__))


if __name__ == "__main__":
    typer.run(main)
