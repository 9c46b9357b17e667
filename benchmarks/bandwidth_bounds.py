"""What launches that memory bounds take at least: the bytes that they must move, over a GPU's published bandwidth."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.op_cases import Widths, cases
from benchmarks.performance_page import DATASHEETS

TILES = 5  # of a 672x672 image in LLaVA-NeXT
OPS = ("token_pack", "patch_embed", "add_layer_norm", "double_layer_norm", "add_rms_norm", "mix_rows", "rope", "swiglu")
HEAD, BYTES = 128, 2  # the size of a head, and a value of bfloat16
CACHED = (1024, 4096)  # rows
# A Vicuna 7B, which LLaVA-NeXT decodes with: its products by one row, [out, in], in each of its layers, and the head.
LAYERS, HEADS = 32, 32
PRODUCTS = {"qkv": (12288, 4096), "attention's output": (4096, 4096), "gate and up": (22016, 4096)}
PRODUCTS |= {"down": (4096, 11008)}
LM_HEAD = (32064, 4096)
# Quantised, query, key and value are three products and gate and up two. Scheme -> bits of a weight and of what its
# group holds, and the group (None: the row).
SCHEMES = {"int8": (8, 32, None), "int4, groups of 32": (4, 32, 32), "int4, groups of 128, zeros": (4, 40, 128)}
LAYER = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)


def launches() -> Iterator[tuple[str, str, float]]:
    """(op, which launch, bytes read and written at least)."""
    for case in cases(TILES, torch.bfloat16, "meta", Widths()):
        if case.op in OPS:
            yield case.op, case.label, case.bytes
    for key_heads in (32, 8):
        for rows in CACHED:
            what = f"1 sequence of {rows} rows, {key_heads} key heads of {HEAD}"
            yield "paged_attention", what, attention_bytes(rows, key_heads)
    for name, shape in (*PRODUCTS.items(), ("head", LM_HEAD)):
        yield "product by one row", f"{name}, {shape[0]} x {shape[1]}", product_bytes(shape)
    for scheme in SCHEMES:
        for shape in dict.fromkeys(LAYER):
            yield "quantised_linear", f"1 row, {shape[0]} x {shape[1]}, {scheme}", quantised_bytes(shape, scheme)
    yield "quantised_linear", f"1 row, head, {LM_HEAD[0]} x {LM_HEAD[1]}, int8", quantised_bytes(LM_HEAD, "int8")


def attention_bytes(rows: int, key_heads: int) -> float:
    """Of one decoding step of a layer: cached keys and values read, the new ones read and written, query and result."""
    return BYTES * HEAD * (2 * rows * key_heads + 4 * key_heads + 2 * HEADS)


def product_bytes(shape: tuple[int, int]) -> float:
    """Weight and input read, output written."""
    out, columns = shape
    return BYTES * (out * columns + out + columns)


def quantised_bytes(shape: tuple[int, int], scheme: str) -> float:
    """Codes, scales, zero points and input read, output written."""
    (out, columns), (bits, of_group, group) = shape, SCHEMES[scheme]
    return out * columns * (bits + of_group / (group or columns)) / 8 + BYTES * (out + columns)


def quantised_token_bytes(rows: int, scheme: str) -> float:
    """Of one decoded token of the 7B with quantised weights, its head in int8."""
    layer = sum(quantised_bytes(shape, scheme) for shape in LAYER) + attention_bytes(rows, HEADS)
    return LAYERS * layer + quantised_bytes(LM_HEAD, "int8")


def token_bytes(rows: int) -> float:
    """Of one decoded token of the 7B: weights and cache."""
    layer = sum(map(product_bytes, PRODUCTS.values())) + attention_bytes(rows, HEADS)
    return LAYERS * layer + product_bytes(LM_HEAD)


def section() -> list[str]:
    """Lines of docs/kernel_bounds.md."""
    bandwidths = [ceilings.bytes_per_second for ceilings in DATASHEETS.values()]
    named = ", ".join(f"{name} {rate / 1e12:.2f} TB/s" for name, rate in zip(DATASHEETS, bandwidths, strict=True))
    times = " | ".join(f"{name}, µs" for name in DATASHEETS)
    lines = [
        "## What memory bounds",
        "",
        "Bandwidth bounds these launches before issue slots do (but for patch_embed, whose products take longer:",
        "[performance.md](performance.md)). Each must read its inputs and write its outputs once; the time is that",
        f"over the datasheets' bandwidths ({named}), in bfloat16, for the {TILES} tiles of a 672x672",
        "image of LLaVA-NeXT 7B and for one decoded token. Nothing here was measured; a launch takes microseconds",
        "itself, and data that is still in a cache may come faster.",
        "",
        f"| op | launch | MB | {times} |",
        f"|---|---|---|{'---|' * len(DATASHEETS)}",
    ]
    for op, what, size in launches():
        cells = [op, what, f"{size / 1e6:.2f}", *(f"{1e6 * size / rate:.1f}" for rate in bandwidths)]
        lines.append("| " + " | ".join(cells) + " |")
    for rows in CACHED:
        least = " and ".join(f"{1e3 * token_bytes(rows) / rate:.2f} ms" for rate in bandwidths)
        lines += ["", f"One token after {rows} rows moves {token_bytes(rows) / 1e9:.2f} GB: {least} at least."]
    for scheme in SCHEMES:
        moved = quantised_token_bytes(CACHED[0], scheme)
        least = " and ".join(f"{1e3 * moved / rate:.2f} ms" for rate in bandwidths)
        lines += ["", f"In {scheme}, after {CACHED[0]} rows, {moved / 1e9:.2f} GB: {least} at least."]
    return [*lines, ""]
