"""Where the decoder's rows come from, as a plan's columns on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llava_fast.inputs.plan.columns import TEXT
from llava_fast.inputs.plan.visual_table import Mix
from llava_fast.ops import mix_rows
from llava_fast.ops.mix_rows import TapUses
from llava_fast.ops.token_pack import RowUses


class MixTable(NamedTuple):
    """Visual rows made of others: index int32, weight float32 [rows, taps] (see inputs.plan.Mix and ops.mix_rows);
    `uses` only where gradients may be asked for."""

    stage: str
    reduce: str
    index: Tensor
    weight: Tensor
    uses: TapUses | None

    def of(self, rows: Tensor) -> Tensor:
        return mix_rows(rows, self.index, self.weight, self.reduce, self.uses)


class Placement(NamedTuple):
    """int32 columns, named as in inputs.plan.TokenPlan: source, row [rows]; kept [kept] the tower's rows to project;
    mixes, whose rows follow the kept ones in the visual table; uses, the placement the other way round, for gradients.
    kept_count [1]: how many of the kept rows are real, in a plan that was filled up to a bucket; else None."""

    source: Tensor
    row: Tensor
    kept: Tensor
    uses: RowUses
    mixes: tuple[MixTable, ...] = ()
    kept_count: Tensor | None = None

    @classmethod
    def of(cls, column: Callable[[str], Tensor | None], mixes: Sequence[Mix] = ()) -> Placement:
        """From a plan's columns by name; `column` gives None for one that the plan does not have."""

        def there(name: str) -> Tensor:
            found = column(name)
            assert found is not None, name
            return found

        def table(mix: Mix) -> MixTable:
            use, start = column(mix.use), column(mix.start)
            uses = None if use is None or start is None else TapUses(use, start)
            return MixTable(mix.stage, mix.reduce, there(mix.index), there(mix.weight).view(torch.float32), uses)

        uses = RowUses(*(there(name) for name in RowUses._fields))
        tables = tuple(table(mix) for mix in mixes)
        return cls(there("source"), there("row"), there("kept"), uses, tables, column("kept_count"))

    def token_ids(self) -> Tensor:
        """int64 [rows]: the token of each text row, 0 elsewhere."""
        return torch.where(self.source == TEXT, self.row, 0).long()

    def with_own_text(self) -> Placement:
        """The same, text read from a table with a row for each decoder row, in place of the embedding's."""
        number = torch.arange(len(self.row) + 1, dtype=self.row.dtype, device=self.row.device)
        text = self.uses.text_row
        uses = self.uses._replace(text_token=text, text_segment=number[: len(text) + 1])
        return self._replace(row=torch.where(self.source == TEXT, number[:-1], self.row), uses=uses)

    def with_constants(self, number: int) -> Placement:
        """The same, for a table of so many constant rows."""
        return self._replace(uses=self.uses._replace(constant_segment=self.uses.constant_segment[: number + 1]))
