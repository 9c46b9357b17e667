"""The inverse of a placement: which output rows read each table row, so that gradients are summed in a fixed order
without atomics."""

from __future__ import annotations

import numpy as np

from llava_fast.inputs.plan.columns import CONSTANT, TEXT, VISUAL


def inverse_columns(columns: dict[str, np.ndarray], visual_rows: int) -> dict[str, np.ndarray]:
    """The inverse of the placement in columns "source" and "row" (see ops.token_pack.InversePlacement)."""
    return _text_segments(columns) | _other_places(columns, visual_rows)


def _text_segments(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Text rows, stably sorted by token id; the distinct ids; the start of each id's segment, then the end."""
    rows = np.flatnonzero(columns["source"] == TEXT).astype(np.int32)
    order = np.argsort(columns["row"][rows], kind="stable")
    tokens, first = np.unique(columns["row"][rows][order], return_index=True)
    return {
        "text_row": rows[order],
        "text_token": tokens.astype(np.int32),
        "text_segment": np.append(first, len(rows)).astype(np.int32),
    }


def _other_places(columns: dict[str, np.ndarray], visual_rows: int) -> dict[str, np.ndarray]:
    """The decoder row that reads each visual row (at most one does), and the decoder rows of the only constant."""
    taken = np.flatnonzero(columns["source"] == VISUAL).astype(np.int32)
    place = np.full(visual_rows, -1, np.int32)
    place[columns["row"][taken]] = taken
    constant = np.flatnonzero(columns["source"] == CONSTANT).astype(np.int32)
    return {
        "visual_place": place,
        "constant_row": constant,
        "constant_segment": np.array([0, len(constant)], np.int32),
    }
