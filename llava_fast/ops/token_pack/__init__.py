"""token_pack: gather decoder inputs from text, visual and constant rows, at the places given by the plan."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llava_fast.ops import backend, library, triton_support
from llava_fast.ops.token_pack import native, reference

backend.register("token_pack", "reference", "any device")
backend.register("token_pack", "triton", "CUDA")
backend.register("token_pack", "native", "CPU; CUDA where csrc was built with it", default_on=("cpu",))


class InversePlacement(NamedTuple):
    """Which output rows read each table row (CSR): lets the backward sum in a fixed order, without atomics or a search.

    All int32, named as the columns of the plan. text_row: output rows with a text embedding, sorted by token id;
    text_token: the distinct ids; text_segment [ids + 1]: offsets of each id's rows in text_row. visual_place
    [visual rows]: the output row that read each visual row, or -1. constant_row, constant_segment [constants + 1]: the
    same as text_row and text_segment, with one segment per constant.
    """

    text_row: Tensor
    text_token: Tensor
    text_segment: Tensor
    visual_place: Tensor
    constant_row: Tensor
    constant_segment: Tensor


def token_pack(
    source: Tensor,
    row: Tensor,
    embedding: Tensor,
    visual: Tensor,
    constant: Tensor,
    inverse: InversePlacement | None = None,
) -> Tensor:
    """Gather rows from three tables.

    source    int [rows]: 0 text embedding, 1 visual, 2 constant, -1 padding (a zero row).
    row       int [rows]: the row of that table (for text, the token id); ignored for padding.
    embedding [vocabulary, width]; visual [n, width]; constant [m, width] (row 0: the newline).
    inverse   the inverse placement, for gradients; the compiled backends' backward requires it.
    Returns [rows, width] in embedding's dtype. Gradients flow to the three tables, summed in float32 in a fixed order.
    Minimum bytes: each output row written once, each input row read once.
    Raises ValueError for tables of different widths and indices of different lengths.
    """
    if source.shape != row.shape or source.dim() != 1:
        raise ValueError(f"source {tuple(source.shape)} and row {tuple(row.shape)} must both be [rows]")
    widths = {embedding.shape[-1], visual.shape[-1], constant.shape[-1]}
    if len(widths) > 1:
        raise ValueError(
            f"tables differ in width: embedding {embedding.shape[-1]}, visual {visual.shape[-1]}, "
            f"constant {constant.shape[-1]}"
        )
    if inverse is not None and (
        len(inverse.visual_place) != len(visual) or len(inverse.constant_segment) != len(constant) + 1
    ):
        raise ValueError(
            f"inverse covers {len(inverse.visual_place)} visual and {len(inverse.constant_segment) - 1} constant rows, "
            f"but the tables have {len(visual)} and {len(constant)}"
        )
    return _token_pack(source, row, embedding, visual, constant, list(inverse or ()))


def _run(
    source: Tensor, row: Tensor, embedding: Tensor, visual: Tensor, constant: Tensor, inverse: list[Tensor]
) -> Tensor:
    tables = (embedding, visual, constant)
    unequal = triton_support.unequal(*tables)
    unfit = {
        "triton": triton_support.unfit(source, row, *tables) or unequal,
        "native": native.unfit(embedding) or unequal or _not_int32(source, row),
    }
    chosen = backend.choose("token_pack", embedding.device.type, unfit)
    if chosen == "reference":
        return reference.token_pack(source, row, *tables)
    embedding, visual, constant = (table.contiguous() for table in tables)
    return _kernels(chosen).token_pack(source.contiguous(), row.contiguous(), embedding, visual, constant)


def _kernels(chosen: str):
    """The module of a compiled backend: native and triton_kernels have the same functions."""
    if chosen == "native":
        return native
    from llava_fast.ops.token_pack import triton_kernels

    return triton_kernels


def _not_int32(*indices: Tensor) -> str | None:
    dtypes = {index.dtype for index in indices} - {torch.int32}
    return f"csrc takes int32 indices, these are {', '.join(map(str, dtypes))}" if dtypes else None


def _run_backward(
    grad: Tensor, source: Tensor, row: Tensor, sizes: list[int], needed: list[bool], inverse: list[Tensor]
) -> tuple[Tensor, ...]:
    unsorted = None if inverse else "no `inverse` was given"
    sums = native.unfit_sum(grad) if needed[0] or needed[2] else native.unfit(grad)
    unfit = {
        "triton": triton_support.unfit(grad) or unsorted,
        "native": sums or unsorted or _not_int32(*inverse),
    }
    chosen = backend.choose("token_pack", grad.device.type, unfit)
    if chosen == "reference":
        found = reference.token_pack_backward(grad, source, row, sizes, needed)
    else:
        kernels, grad = _kernels(chosen), grad.contiguous()
        by = InversePlacement(*(column.contiguous() for column in inverse))
        text = (by.text_row, by.text_token, by.text_segment)
        found = (
            kernels.embedding_gradient(grad, *text, sizes[0]) if needed[0] else None,
            kernels.visual_gradient(grad, by.visual_place) if needed[1] else None,
            kernels.constant_gradient(grad, by.constant_row, by.constant_segment, sizes[2]) if needed[2] else None,
        )
    return tuple(grad.new_empty(0, grad.shape[1]) if table is None else table for table in found)


def _save(ctx, inputs, output) -> None:
    source, row, embedding, visual, constant, inverse = inputs
    ctx.save_for_backward(source, row, *inverse)
    ctx.tables = [(len(table), table.dtype) for table in (embedding, visual, constant)]


def _backward(ctx, grad: Tensor):
    source, row, *inverse = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[2:5])
    found = token_pack_backward(grad, source, row, [size for size, _ in ctx.tables], needed, inverse)
    gradients = (
        table.to(dtype) if want else None for table, want, (_, dtype) in zip(found, needed, ctx.tables, strict=True)
    )
    return (None, None, *gradients, [None] * len(inverse))


token_pack_backward = library.define(
    "token_pack_backward(Tensor grad, Tensor source, Tensor row, SymInt[] sizes, bool[] needed, Tensor[] inverse)"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward,
    lambda grad, source, row, sizes, needed, inverse: tuple(
        grad.new_empty(size if want else 0, grad.shape[1]) for size, want in zip(sizes, needed, strict=True)
    ),
)
_token_pack = library.define(
    "token_pack(Tensor source, Tensor row, Tensor embedding, Tensor visual, Tensor constant, Tensor[] inverse)"
    " -> Tensor",
    _run,
    lambda source, row, embedding, visual, constant, inverse: embedding.new_empty(len(source), embedding.shape[1]),
    _backward,
    _save,
)
