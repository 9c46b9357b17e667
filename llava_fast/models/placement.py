"""The placement of the decoder's rows: a plan's columns on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llava_fast.inputs.plan.columns import TEXT, pack_columns
from llava_fast.inputs.plan.visual_table import Pool
from llava_fast.ops import mix_rows
from llava_fast.ops.mix_rows import InversePooling
from llava_fast.ops.token_pack import InversePlacement


class PoolTable(NamedTuple):
    """Visual rows pooled from others: source int32, weight float32 [rows, K] (see inputs.plan.Pool, ops.mix_rows).
    `inverse` is None in a plan without labels, which needs no gradients."""

    stage: str
    reduce: str
    source: Tensor
    weight: Tensor
    inverse: InversePooling | None

    def of(self, rows: Tensor) -> Tensor:
        return mix_rows(rows, self.source, self.weight, self.reduce, self.inverse)


class Placement(NamedTuple):
    """int32 columns, named as in inputs.plan.TokenPlan: source, row [rows]; kept [kept] the tower's rows to project;
    pools: tables of rows that follow the kept ones in the visual table; inverse: the inverse placement, for gradients.
    kept_count [1]: how many of the kept rows are real, in a plan padded to a bucket; else None."""

    source: Tensor
    row: Tensor
    kept: Tensor
    inverse: InversePlacement
    pools: tuple[PoolTable, ...] = ()
    kept_count: Tensor | None = None

    @classmethod
    def of(cls, column: Callable[[str], Tensor | None], pools: Sequence[Pool] = ()) -> Placement:
        """From a plan's columns by name; `column` gives None for one that the plan does not have."""

        def there(name: str) -> Tensor:
            found = column(name)
            assert found is not None, name
            return found

        def table(pool: Pool) -> PoolTable:
            order, start = column(pool.order), column(pool.start)
            inverse = None if order is None or start is None else InversePooling(order, start)
            return PoolTable(
                pool.stage, pool.reduce, there(pool.index), there(pool.weight).view(torch.float32), inverse
            )

        inverse = InversePlacement(*(there(name) for name in InversePlacement._fields))
        tables = tuple(table(pool) for pool in pools)
        return cls(there("source"), there("row"), there("kept"), inverse, tables, column("kept_count"))

    def token_ids(self) -> Tensor:
        """int64 [rows]: the token of each text row, 0 elsewhere."""
        return torch.where(self.source == TEXT, self.row, 0).long()

    def with_own_text(self) -> Placement:
        """The same placement, but text is read from a table with one row per decoder row instead of the embedding's."""
        number = torch.arange(len(self.row) + 1, dtype=self.row.dtype, device=self.row.device)
        text = self.inverse.text_row
        inverse = self.inverse._replace(text_token=text, text_segment=number[: len(text) + 1])
        return self._replace(row=torch.where(self.source == TEXT, number[:-1], self.row), inverse=inverse)

    def with_constants(self, number: int) -> Placement:
        """The same placement for a table of `number` constant rows."""
        return self._replace(
            inverse=self.inverse._replace(constant_segment=self.inverse.constant_segment[: number + 1])
        )


def to_device(columns: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Columns as int32 tensors on a device, moved in one copy without a synchronisation."""
    flat, sections = pack_columns(columns)
    moved = torch.from_numpy(flat)
    if device.type == "cuda":
        moved = moved.pin_memory().to(device, non_blocking=True)
    return {name: moved[start : start + int(np.prod(shape))].view(shape) for name, (start, shape) in sections.items()}
