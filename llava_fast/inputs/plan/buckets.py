"""Pads plans to bucket sizes with unused tiles and rows, so that one CUDA graph can run many batches.

A graph is captured for fixed shapes. `bucket_of` rounds a plan's sizes up to a bucket, `fill` makes a plan of exactly
that size: padding rows have index -1 in every column, and their results are never read. Columns tile_count and
kept_count [1] hold the real counts; kernels read them on the device and skip the tiles and kept rows after them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from llava_fast.inputs.plan.columns import PADDING, pack_columns
from llava_fast.inputs.plan.plan import TokenPlan


@dataclass(frozen=True)
class Bucket:
    """Padded numbers of tiles, projected (kept) ViT rows and decoder rows."""

    tiles: int
    kept: int
    rows: int


def bucket_of(plan: TokenPlan) -> Bucket:
    """The smallest bucket that fits the plan. Tiles are rounded up to three significant binary digits (1 to 8, 10, 12,
    14, 16, 20, ...), so that at most a fifth are padding, on which the tower runs too. Rows are rounded up to two
    digits (64, 96, 128, 192, ...), since kernels skip their padding."""
    kept = len(plan.column("kept"))
    return Bucket(_round_up(plan.tiles, 1, digits=3), _round_up(kept, 64), _round_up(plan.rows, 64))


def fill(plan: TokenPlan, bucket: Bucket) -> TokenPlan:
    """The plan padded at the end of its tiles, kept rows and decoder rows, for inference: it has only the columns that
    `inputs_embeds` reads; those for gradients of text rows are empty.

    Rows keep their numbers, so the first `plan.rows` output rows are those of the plan. Raises ValueError for a plan
    that exceeds the bucket, has pooled rows (whose tables cannot be padded) or images of native sizes (for which a
    graph would replay the attention of one set of sizes), or text that the connector reads."""
    if plan.pools:
        raise ValueError("a plan with pooled rows (pooled or shrunk features) cannot be padded to a bucket")
    if plan.grids:
        raise ValueError("a plan of images of native sizes cannot be padded to a bucket")
    if "instruction" in plan.sections:
        raise ValueError("a plan with text for the connector cannot be padded to a bucket")
    kept = len(plan.column("kept"))
    if plan.tiles > bucket.tiles or kept > bucket.kept or plan.rows > bucket.rows:
        raise ValueError(f"a plan of {plan.tiles} tiles, {kept} kept rows and {plan.rows} rows does not fit {bucket}")
    sizes = {"source": bucket.rows, "row": bucket.rows, "constant_row": bucket.rows}
    sizes |= {"kept": bucket.kept, "visual_place": bucket.kept}
    columns = {name: _filled(plan.column(name), size) for name, size in sizes.items()}
    columns |= {"tile_count": np.array([plan.tiles], np.int32), "kept_count": np.array([kept], np.int32)}
    columns["constant_segment"] = plan.column("constant_segment")
    columns |= {
        name: np.zeros(size, np.int32) for name, size in (("text_row", 0), ("text_token", 0), ("text_segment", 1))
    }
    flat, sections = pack_columns(columns)
    return replace(plan, tiles=bucket.tiles, rows=bucket.rows, flat=flat, sections=sections)


def _filled(column: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([column, np.full(size - len(column), PADDING, np.int32)])


def _round_up(number: int, least: int, digits: int = 2) -> int:
    """Round up to a number with at most `digits` significant binary digits."""
    number = max(number, least)
    step = 1 << max(number.bit_length() - digits, 0)
    return -(-number // step) * step
