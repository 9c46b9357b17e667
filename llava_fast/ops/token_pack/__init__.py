"""token_pack: decoder inputs from text, visual and constant rows, each in the place the plan gives it."""

from __future__ import annotations

from torch import Tensor

from llava_fast.ops import backend
from llava_fast.ops.token_pack import reference

backend.register("token_pack", "reference", "any device")


def token_pack(source: Tensor, row: Tensor, embedding: Tensor, visual: Tensor, constant: Tensor) -> Tensor:
    """Rows gathered from three tables.

    source    int [rows]: 0 text embedding, 1 visual, 2 constant, -1 filler (a zero row).
    row       int [rows]: the row of that table (for text, the token id); ignored for fillers.
    embedding [vocabulary, width]; visual [n, width]; constant [m, width] (row 0: the newline).
    Returns [rows, width] in embedding's dtype. Minimum bytes: each output row written once, each input row read.
    Raises ValueError for tables of different width or indices of different length.
    """
    if source.shape != row.shape or source.dim() != 1:
        raise ValueError(f"source {tuple(source.shape)} and row {tuple(row.shape)} must both be [rows]")
    widths = {embedding.shape[-1], visual.shape[-1], constant.shape[-1]}
    if len(widths) > 1:
        raise ValueError(
            f"tables differ in width: embedding {embedding.shape[-1]}, visual {visual.shape[-1]}, "
            f"constant {constant.shape[-1]}"
        )
    backend.choose("token_pack")
    return reference.token_pack(source, row, embedding, visual, constant)
