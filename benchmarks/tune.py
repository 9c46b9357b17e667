"""Find the launch configuration of every Triton kernel on this GPU and write the table the package ships.

python -m benchmarks.tune --output-dir llava_fast/ops/tuned

Each candidate must give the right answer before it is timed. Times are medians of CUDA-graph replays over inputs larger
than the cache. The table is named for the GPU (a100, h100, h200) and is only data (llava_fast/ops/triton_support.py).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from benchmarks.op_cases import OpCase, Widths, cases
from llava_fast.ops import triton_support, use_backend
from llava_fast.ops.triton_support import Config

TILES = (1, 5, 40)
ROW_BLOCKS = [{"BLOCK": block, "num_warps": warps} for block in (512, 1024, 2048, 4096) for warps in (2, 4, 8)]
PRODUCTS = [
    {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
    for m, n, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
    for k in (32, 64, 128)
    for stages in (2, 3, 4)
]
CANDIDATES: dict[str, list[Config]] = {
    "pack_kernel": ROW_BLOCKS,
    "take_rows_kernel": ROW_BLOCKS,
    "mix_kernel": [config for config in ROW_BLOCKS if config["BLOCK"] <= 2048],
    **dict.fromkeys(("patch_embed_kernel", "patch_embed_kernel_rows"), PRODUCTS),
    **dict.fromkeys(
        ("patch_weight_gradient_kernel", "patch_weight_gradient_kernel_rows"),
        [
            {**config, "PARTS": parts}
            for config in PRODUCTS
            for parts in (2, 8, 32)
            if config["BLOCK_K"] < 128 and config["num_stages"] > 2
        ],
    ),
}


def milliseconds(work) -> float:
    """Median time of one call on the GPU, launch gaps left out."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(work, rep=30, return_mode="median")


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """||found - exact|| / ||exact||; NaN counts as infinitely wrong."""
    error = ((found.double() - exact.double()).norm() / exact.double().norm()).item()
    return error if error == error else float("inf")


def best_config(case: OpCase, kernel: str, candidates: list[Config], limit: float) -> tuple[Config, float] | None:
    """The fastest candidate that is right, and its milliseconds; None if none is."""
    exact = case.exact()
    found: list[tuple[float, Config]] = []
    for candidate in candidates:
        with triton_support.forced({kernel: candidate}), use_backend("triton"):
            try:
                if relative(case.run(), exact) <= limit:
                    found.append((milliseconds(case.run), candidate))
            except Exception as error:  # a configuration that does not fit this GPU is no candidate
                print(f"{kernel} {candidate}: {type(error).__name__}: {str(error)[:120]}")
    return (min(found, key=lambda pair: pair[0])[::-1]) if found else None


def tune(dtype: torch.dtype, limit: float) -> dict[str, list[dict]]:
    """Kernel -> entries by rows, as the tables hold them; neighbouring entries that agree are one."""
    entries: dict[str, list[dict]] = {}
    for tiles in tqdm(TILES, desc="tuning", unit="size"):
        for case in cases(tiles, dtype, "cuda", Widths()):
            for kernel in case.kernels:
                found = best_config(case, kernel, CANDIDATES[kernel], limit)
                if found is None:
                    raise SystemExit(f"{kernel}: no candidate gives the right answer for {case.label}")
                rows = 0 if tiles == TILES[0] else 1 << (case.rows.bit_length() - 1)
                entries.setdefault(kernel, []).append({"rows": rows, "config": found[0], "ms": round(found[1], 5)})
    return {kernel: _merged(each) for kernel, each in entries.items()}


def _merged(entries: list[dict]) -> list[dict]:
    return [next(group) for _, group in itertools.groupby(entries, key=lambda entry: entry["config"])]


def write_table(entries: dict[str, list[dict]], path: Path) -> None:
    """One kernel a line, so that a change of one shows as one line."""
    lines = [f" {json.dumps(kernel)}: {json.dumps(each)}" for kernel, each in sorted(entries.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(
    output_dir: Annotated[Path, typer.Option(help="Where <gpu>.json is written.")] = Path("llava_fast/ops/tuned"),
) -> None:
    """Tune every kernel in bfloat16 on the present GPU and write its table."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("tuning needs a CUDA GPU, and none is usable here")
    kind = triton_support.device_kind(torch.device("cuda"))
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"{kind if kind != 'default' else 'other'}.json"
    write_table(tune(torch.bfloat16, limit=1e-2), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
