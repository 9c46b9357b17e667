"""A plan without some of its visual rows: those that a router leaves out, once a model has chosen them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llava_fast.inputs.plan.columns import IGNORE, PADDING, VISUAL, pack_columns
from llava_fast.inputs.plan.inverse import inverse_columns
from llava_fast.inputs.plan.plan import TokenPlan

_PAD = {"source": PADDING, "row": -1, "position": 0, "label": IGNORE, "sequence": -1, "modality": -1}


def without_rows(plan: TokenPlan, left_out: np.ndarray) -> tuple[TokenPlan, np.ndarray]:
    """(the plan that the same batch would have without these rows, the numbers in `plan`'s visual table of the rows in
    its own).

    left_out  bool [rows], visual rows outside of branches. A label whose preceding row is left out is predicted by the
              last row before it that remains.

    Raises ValueError for other rows, and for a plan with pooled rows.
    """
    columns = plan.columns
    is_visual, total = columns["source"] == VISUAL, plan.rows
    if plan.pools or (left_out & ~is_visual).any():
        raise ValueError("only visual rows of a plan without pooled rows can be left out")
    starts = columns["boundaries"][:-1]
    windows = [np.arange(start, start + length) for start, length in zip(starts, plan.lengths, strict=True)]
    for window, branches in zip(windows, plan.branches, strict=False):
        if left_out[window[len(window) - sum(branches) :]].any():
            raise ValueError("rows of branches cannot be left out")
    stay = [window[~left_out[window]] for window in windows]
    lengths = tuple(map(len, stay))
    width = max(lengths, default=0)
    stride = [width] * len(lengths) if plan.layout == "padded" else list(lengths)
    boundaries = np.concatenate([[0], np.cumsum(stride)]).astype(np.int32)
    origin = np.full(int(boundaries[-1]), -1)
    number = np.full(total, -1, np.int32)
    for rows, start in zip(stay, boundaries[:-1], strict=True):
        origin[start : start + len(rows)] = rows
        number[rows] = np.arange(start, start + len(rows))
    before = np.cumsum(left_out)
    gone = np.zeros(total, np.int32)
    for window in windows:
        gone[window] = before[window] - before[window[:1]] + left_out[window[:1]]

    made = {name: np.append(columns[name], pad)[origin].astype(np.int32) for name, pad in _PAD.items()}
    made["position"] -= np.append(gone, 0)[origin]
    taken = made["source"] == VISUAL
    used, made["row"][taken] = np.unique(made["row"][taken], return_inverse=True)
    remaining = np.maximum.accumulate(np.where(left_out, -1, np.arange(total)))
    made |= {name: columns[name][used] for name in ("kept", "tile_of_kept")}
    made["boundaries"] = boundaries
    made["last_row"] = (boundaries[:-1] + np.array(lengths, np.int32) - 1).astype(np.int32)
    made["supervised_row"] = number[remaining[columns["supervised_row"]]]
    for name in ("supervised_target", "supervised_sequence", "supervised_branch", "instruction"):
        if name in plan.sections:
            made[name] = columns[name]
    flat, sections = pack_columns(made | inverse_columns(made, len(used)))
    return replace(plan, lengths=lengths, rows=len(origin), flat=flat, sections=sections), used
