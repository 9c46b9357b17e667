"""The one entry to attention: rows of many sequences, grouped by `Spans`, through scaled dot-product attention, or
on CUDA all at once through `varlen`.

Shapes: R rows (all sequences concatenated), H heads, K key heads (H is a multiple of K), D head size, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_fast.models.blocks import varlen
from llava_fast.models.paged_cache import BlockTable, PagedCache


@dataclass(frozen=True)
class Spans:
    """How rows group into sequences, on the host: sequence s has rows starts[s] : starts[s] + lengths[s].

    With a cache, `tables[s]` is the block table of its cached rows, `before[s]` their number. `dense` (sequences,
    width) is set if the rows form a rectangle, so that one batched call is enough. `branches[s]` has the row counts of
    sequence s's branches (see inputs.plan): the rows of a branch attend to the prefix and to that branch. `encoded[s]`:
    how many of its first rows, cached ones included, an encoder reads (decoders.t5); empty without an encoder.
    `prompts[s]`: the number of rows of its prompt, if these may be an answer's rows (see blocks.rope); or empty.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    tables: tuple[BlockTable, ...] = ()
    before: tuple[int, ...] = ()
    dense: tuple[int, int] | None = None
    branches: tuple[tuple[int, ...], ...] = ()
    encoded: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    memo: dict[torch.device, dict[str, Any]] = field(default_factory=dict, compare=False, repr=False)
    """What the layers of a pass share, made at the first on each device."""

    @property
    def are_adjacent(self) -> bool:
        """Whether the sequences' rows are end to end from the first row on."""
        at = 0
        for start, length in zip(self.starts, self.lengths, strict=True):
            if start != at:
                return False
            at += length
        return at > 0

    @property
    def reach(self) -> int:
        """Rows of the longest sequence, those before this pass included."""
        return max((n + (self.before[i] if self.before else 0) for i, n in enumerate(self.lengths)), default=0)

    def parts(self) -> tuple[list[int], list[tuple[int, list[int]]]]:
        """The sequences without a cache as one call takes them: (sizes of the pieces that rows split into, each
        sequence's number of queries and the pieces that are its keys). A further branch is a sequence of its own, whose
        keys are the prefix and then its own."""
        pieces: list[int] = []
        found: list[tuple[int, list[int]]] = []
        for number, length in enumerate(self.lengths):
            branches = self.branches[number] if self.branches else ()
            prefix = len(pieces)
            if len(branches) < 2:
                pieces.append(length)
                found.append((length, [prefix]))
                continue
            pieces += [length - sum(branches), *branches]
            found.append((length - sum(branches[1:]), [prefix, prefix + 1]))
            found += [(rows, [prefix, prefix + 1 + i]) for i, rows in enumerate(branches) if i and rows]
        return pieces, found


def attend(
    query_RHD: Tensor,
    key_RKD: Tensor,
    value_RKD: Tensor,
    spans: Spans,
    layer: int,
    cache: PagedCache | None,
    window: int | None,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """Causal attention inside each sequence: [R, H*D]. With a cache, keys and values are stored in it first and each
    sequence also attends to its earlier rows. `window` is the number of keys that a row attends to. `slopes_H`: ALiBi's
    slope of each head, subtracted once for each position between query and key (Press et al. 2022).
    """
    if cache is not None and all(length == 1 for length in spans.lengths):
        return _attend_one_row_each(query_RHD, key_RKD, value_RKD, spans, layer, cache, window, slopes_H)
    if cache is None and spans.dense is not None:
        return _attend_dense(query_RHD, key_RKD, value_RKD, spans.dense, window, slopes_H)
    if varlen.unfit(query_RHD, slopes_H) is None and (cache is None or not spans.branches) and spans.are_adjacent:
        return _attend_at_once(query_RHD, key_RKD, value_RKD, spans, layer, cache, window)
    out = torch.zeros_like(query_RHD) if sum(spans.lengths) < len(query_RHD) else torch.empty_like(query_RHD)
    pieces = []
    none = not spans.lengths  # then use one empty sequence, so that the result depends on the inputs (sharded training)
    for number, (start, length) in enumerate([(0, 0)] if none else zip(spans.starts, spans.lengths, strict=True)):
        query, key, value = (t[start : start + length].transpose(0, 1)[None] for t in (query_RHD, key_RKD, value_RKD))
        if cache is not None:
            key, value = cache.append(layer, spans.tables[number], spans.before[number], key[0], value[0])
            key, value = key[None], value[None]
        branches = spans.branches[number] if spans.branches else ()
        pieces += [part[0].transpose(0, 1) for part in _with_branches(query, key, value, window, slopes_H, branches)]
    if sum(spans.lengths) == len(query_RHD):
        return torch.cat(pieces).flatten(1)
    place = torch.cat([torch.arange(s, s + n) for s, n in zip(spans.starts, spans.lengths, strict=True)])
    return out.index_copy(0, place.to(out.device), torch.cat(pieces)).flatten(1)


def _attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, layer: int, cache: PagedCache | None, window: int | None
) -> Tensor:
    """All sequences in one call."""
    rows = sum(spans.lengths)
    query, padding = query[:rows], len(query) - rows
    key, value = key[:rows], value[:rows]
    memo = spans.memo.setdefault(query.device, {})
    if cache is not None:
        if not memo:
            memo["rows"] = cache.rows_of_pass(spans.tables, spans.before, spans.lengths)
            keys = [at + length for at, length in zip(spans.before, spans.lengths, strict=True)]
            memo["at"] = varlen.Ragged.of(spans.lengths, keys, query.device)
        key, value = cache.append_pass(layer, memo["rows"], key, value)
    else:
        if not memo:
            memo["pieces"], sequences = spans.parts()
            memo["order"] = [piece for _, own in sequences for piece in own]
            keys = [sum(memo["pieces"][piece] for piece in own) for _, own in sequences]
            memo["at"] = varlen.Ragged.of([queries for queries, _ in sequences], keys, query.device)
        if len(memo["order"]) > len(memo["pieces"]):  # prefixes are repeated
            key, value = (torch.cat([each.split(memo["pieces"])[i] for i in memo["order"]]) for each in (key, value))
    attended = varlen.attend_ragged(query, key, value, memo["at"], window)
    return F.pad(attended.flatten(1), (0, 0, 0, padding))


def _with_branches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    slopes_H: Tensor | None,
    branches: tuple[int, ...],
) -> list[Tensor]:
    """`_causal` of prefix and first branch, which form one ordinary sequence, then of each further branch, whose few
    queries attend to a copy of the prefix's keys and to their own.
    """
    if len(branches) < 2:
        return [_causal(query, key, value, window, slopes_H)]
    total = query.shape[2]
    prefix, sizes = total - sum(branches), (total - sum(branches[1:]), *branches[1:])
    queries, keys, values = (t.split(sizes, 2) for t in (query, key, value))
    out = [_causal(queries[0], keys[0], values[0], window, slopes_H)]
    for query, own_key, own_value in zip(queries[1:], keys[1:], values[1:], strict=True):
        if query.shape[2]:
            seen_key, seen_value = (
                torch.cat([t[:, :, :prefix], own], 2) for t, own in ((key, own_key), (value, own_value))
            )
            out.append(_causal(query, seen_key, seen_value, window, slopes_H))
    return out


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int | None, slopes_H: Tensor | None) -> Tensor:
    """[1, H, q, D] over [1, K, k, D], the queries being the last q of the k positions."""
    length, total = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if slopes_H is None and length == total and (window is None or total <= window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=length > 1, enable_gqa=grouped)
    position = torch.arange(total - length, total, device=query.device)[:, None]
    at = torch.arange(total, device=query.device)[None, :]
    mask = at <= position
    if window is not None:
        mask &= at > position - window
    if slopes_H is not None:
        bias = slopes_H[:, None, None] * (at - position)
        mask = bias.masked_fill(~mask, -torch.inf).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)


def _attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: tuple[int, int],
    window: int | None,
    slopes_H: Tensor | None,
) -> Tensor:
    """Equal-length sequences in one call. Padding is on the right, so the causal mask alone hides it from real rows."""
    query, key, value = (t.unflatten(0, shape).transpose(1, 2) for t in (query, key, value))
    return _causal(query, key, value, window, slopes_H).transpose(1, 2).flatten(0, 1).flatten(1)


def _attend_one_row_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    layer: int,
    cache: PagedCache,
    window: int | None,
    slopes_H: Tensor | None,
) -> Tensor:
    """Decoding: one new row per sequence. The query heads of a key head become the rows of one small matrix, so grouped
    heads need no copies of the cache."""
    count, heads, size = query.shape
    keys, values, mask = cache.append_one_each(layer, spans.tables, spans.before, key, value, window)
    grouped = query.view(count, keys.shape[1], heads // keys.shape[1], size)
    if slopes_H is not None:
        rows = torch.arange(keys.shape[2], device=query.device)
        back_n1R = rows - torch.tensor(spans.before, device=query.device)[:, None, None]
        bias = (slopes_H[:, None] * back_n1R).view(count, *grouped.shape[1:3], -1)
        mask = (bias if mask is None else bias.masked_fill(~mask, -torch.inf)).to(query.dtype)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(count, heads * size)
