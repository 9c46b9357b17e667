"""From a tower's features to the decoder's inputs: kept rows are projected, rows pooled, and every row placed.

Shared by the engine's models and transformers' (llava_fast.accelerated): each passes its `Parts`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from llava_fast.models.connectors.base import PlainLinears
from llava_fast.models.fused.gate import is_plain, takes
from llava_fast.models.placement import Placement
from llava_fast.ops import assemble_inputs, token_pack


class Parts(NamedTuple):
    """The parts of a model between its tower and its decoder.

    newline        [width], the row that follows each line of tiles, or None.
    project        (features [rows, F], kept int64, rows pooled from features) -> [kept, then pooled; width].
    plain_linears  returns the connector's Linears if it has only those (see Connector.plain_linears), or None.
    """

    newline: Tensor | None
    project: Callable[[Tensor, Tensor, list[Tensor]], Tensor]
    plain_linears: Callable[[], PlainLinears | None]


def inputs_embeds(
    parts: Parts, embedding: nn.Module, features: Tensor | None, at: Placement, ids: Tensor | None = None
) -> tuple[Tensor, torch.dtype]:
    """([rows, width] in the embedding's dtype, the dtype of the connector's output).

    One op if a backend fuses connector and placement and the modules are plain; else separate steps.

    embedding the decoder's token embedding.
    features  the tower's rows of all tiles end to end [tiles * rows, F]; None without tiles.
    ids       the embedding's input if its table may not be read directly: a token for each row, of any shape. Default:
              the plan's tokens, 0 for rows without one.
    """
    table, at = _text(embedding, at, ids)
    if features is None:
        visual = _empty(table)
    elif (embeds := _fused(parts, table, features, at)) is not None:
        return embeds, table.dtype
    else:
        visual = visual_rows(parts, features, at)
    return placed(parts, table, visual.to(table.dtype), at), visual.dtype


def placed_rows(parts: Parts, embedding: nn.Module, visual: Tensor, at: Placement) -> Tensor:
    """As `inputs_embeds`, from the rows of the plan's visual table."""
    table, at = _text(embedding, at)
    return placed(parts, table, visual.to(table.dtype), at)


def visual_embeds(parts: Parts, features: Tensor, at: Placement, width: int) -> Tensor:
    """[rows, width] in the dtype of the connector's output, for a plan without text: rows of images and videos alone,
    equal to those that `inputs_embeds` places among the text."""
    embeds = _fused(parts, features.new_empty(0, width), features, at)
    return placed(parts, None, visual_rows(parts, features, at), at) if embeds is None else embeds


def _text(embedding: nn.Module, at: Placement, ids: Tensor | None = None) -> tuple[Tensor, Placement]:
    """The table of text rows, and the placement for it."""
    if reads_table(embedding):
        return embedding.weight, at
    table: Tensor = embedding(at.token_ids() if ids is None else ids).flatten(0, -2)
    return table, at.with_own_text()


def _fused(parts: Parts, table: Tensor, features: Tensor, at: Placement) -> Tensor | None:
    """Connector and placement as one op, or None if they must run as separate steps."""
    linears = None if at.pools else parts.plain_linears()
    if linears is None:
        return None
    weights, biases, activation = linears
    if not takes("assemble_inputs", features, operands=(table, *weights, *biases)):
        return None
    newline, at = _constants(parts.newline, table, at)
    placement = at.source, at.row, table, newline, at.inverse
    return assemble_inputs(features, at.kept, weights, biases, *placement, activation, at.kept_count)


def visual_rows(parts: Parts, features: Tensor, at: Placement) -> Tensor:
    """The plan's visual table [kept rows, then pooled ones; width]: only rows that are used are projected."""
    pooled = [pool.of(features) for pool in at.pools if pool.stage == "before"]
    projected = parts.project(features, at.kept.long(), pooled)
    return joined([projected, *(pool.of(projected) for pool in at.pools if pool.stage == "after")])


def placed(parts: Parts, table: Tensor | None, visual: Tensor, at: Placement) -> Tensor:
    """[rows, width]: rows of `table` (None: no text), visual rows and newlines, each at its place."""
    table = _empty(visual) if table is None else table
    newline, at = _constants(parts.newline, table, at)
    return token_pack(at.source, at.row, table, visual, newline, at.inverse)


def project_rows(connector: nn.Module, features: Tensor, kept: Tensor, pooled: list[Tensor]) -> Tensor:
    """Parts.project of a connector that works row by row."""
    return connector(joined([features[kept], *pooled]))


def project_tiles(
    connector: Callable[[Tensor], Tensor],
    rows_per_tile: int,
    left_out: int,
    features: Tensor,
    kept: Tensor,
    pooled: list[Tensor],
) -> Tensor:
    """Parts.project of a connector that reads whole tiles: its input is all their rows but the first `left_out` of
    each, and `kept` indexes its output ([tiles, rows, width], or [rows, width]). Raises ValueError if rows are pooled
    before it.
    """
    if pooled:
        raise ValueError("rows cannot be pooled before a connector that reads whole tiles")
    rows_TNC = features.unflatten(0, (len(features) // rows_per_tile, rows_per_tile))
    return connector(rows_TNC[:, left_out:]).flatten(0, -2)[kept]


def project_images(
    connector: nn.Module,
    grids: tuple[tuple[int, int], ...],
    features: Tensor,
    kept: Tensor,
    pooled: list[Tensor],
) -> Tensor:
    """Parts.project of a connector that reads whole images of native sizes, `grids` their (rows, columns): one call for
    consecutive images of one shape. `kept` indexes its output. Raises ValueError if rows are pooled before it.
    """
    if pooled:
        raise ValueError("rows cannot be pooled before a connector that reads whole images")
    made, start = [], 0
    for shape, same in itertools.groupby(grids or ((1, 1),)):
        count, length = len(list(same)) if grids else 0, shape[0] * shape[1]
        rows_TNC = features[start : start + count * length].unflatten(0, (count, length))
        made.append(connector(rows_TNC, shape=shape).flatten(0, 1))
        start += count * length
    return joined(made)[kept]


def reads_table(embedding: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether text rows may be read from the embedding's weight: an exact nn.Embedding without special gradients."""
    return (
        is_plain(embedding, nn.Embedding)
        and embedding.max_norm is None
        and not (embedding.sparse or embedding.scale_grad_by_freq)
        and (embedding.padding_idx is None or not embedding.weight.requires_grad)
    )


def joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _constants(newline: Tensor | None, like: Tensor, at: Placement) -> tuple[Tensor, Placement]:
    """The table of constant rows, the newline if there is one, in the dtype of `like`, and the placement for it."""
    table = _empty(like) if newline is None else newline[None].to(like.dtype)
    return table, at.with_constants(len(table))


def _empty(like: Tensor) -> Tensor:
    """A table without rows. (A slice of `like` would give it a gradient of zeros of its whole size.)"""
    return like.new_empty(0, like.shape[-1])
