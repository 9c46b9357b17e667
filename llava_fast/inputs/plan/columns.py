"""The columns of a plan: the meaning of their values, and their packing into one flat array."""

from __future__ import annotations

import numpy as np

PADDING, TEXT, VISUAL, CONSTANT = -1, 0, 1, 2
"""Source tables of a row: none, text embedding (row = token id), visual rows, constant rows (0 = newline)."""

MODALITY_TEXT, MODALITY_IMAGE, MODALITY_VIDEO = 0, 1, 2
IGNORE = -100
"""Label of a row that is not supervised (PyTorch's ignore_index)."""


def pack_columns(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, tuple[int, tuple[int, ...]]]]:
    """(flat int32 array, name -> (offset, shape) of each column); every column starts on a 16-byte boundary."""
    sections, start = {}, 0
    for name, column in columns.items():
        sections[name] = (start, column.shape)
        start += -(-column.size // 4) * 4
    flat = np.zeros(start, np.int32)
    for name, column in columns.items():
        first = sections[name][0]
        flat[first : first + column.size] = column.ravel()
    return flat, sections
