"""Tensor names: mapping between those stored in a family's checkpoints and ours, as plain strings.

Reading accepts any spelling of a family; writing requires one by name:

    hf        what the Hub has and every transformers reads
    hf5       what transformers 5 holds in memory, and so what PEFT calls them
    original  the original LLaVA's
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from llava_fast.errors import CheckpointError
from llava_fast.models.config import LlavaConfig
from llava_fast.ops.quantised_linear import packing
from llava_fast.storage.tensor_files import WEIGHT_DTYPES, StoredTensor

Spelling = Literal["hf", "hf5", "original"]
HEAD = "decoder.lm_head.weight"  # our name
Rule = tuple[str, str]
"""(ours, stored): how our name and the stored one start, both ending in "."; or two whole names."""


@dataclass(frozen=True)
class NameMap:
    """The names of a family's tensors.

    written  the rules of each spelling that is written. They are read too.
    read     further rules that are read: what other programs write.
    skipped  a pattern of stored names that no model needs. They are skipped deliberately, and not written back.
    """

    written: Mapping[Spelling, tuple[Rule, ...]]
    read: tuple[Rule, ...] = ()
    skipped: re.Pattern[str] = re.compile(r"\.position_ids$|\.rotary_emb\.inv_freq$")

    def is_skipped(self, stored: str) -> bool:
        """Whether a stored tensor is left out on purpose: buffers that are recomputed, modules that never run."""
        return self.skipped.search(stored) is not None

    def from_stored(self, stored: str) -> str | None:
        """Our name of a tensor stored under `stored`, in whichever spelling; None for a name the family does not have.
        If several rules match, the one with the longest prefix of the stored name wins."""
        ours = self._read.get(stored)
        end = len(stored)
        while ours is None and (end := stored.rfind(".", 0, end)) >= 0:
            if (start := self._read.get(stored[: end + 1])) is not None:
                ours = start + stored[end + 1 :]
        return ours

    def to_stored(self, ours: str, spelling: Spelling, config: LlavaConfig) -> str:
        """The name under which `spelling` stores our tensor of a model of this `config`. Raises CheckpointError for a
        spelling that the family does not have, and for a tensor with no name in it."""
        if spelling not in self.written:
            kinds = ", ".join(self.written)
            raise CheckpointError(f"tensors of a {config.model_type} have no {spelling!r} names; supported are {kinds}")
        return self.by_rules(ours, spelling)

    def by_rules(self, ours: str, spelling: Spelling) -> str:
        """As `to_stored`, by the rules alone; the first match wins."""
        for mine, theirs in self.written[spelling]:
            if (renamed := _renamed(ours, mine, theirs)) is not None:
                return renamed
        raise CheckpointError(f"{ours!r} is not a tensor of a LLaVA model, so layout {spelling!r} has no name for it")

    def name_tensors(
        self, stored: Mapping[str, StoredTensor], rename: Callable[[str], str | None] | None = None
    ) -> dict[str, StoredTensor]:
        """Stored tensors under our names (`rename`, or `from_stored`), without those that are skipped.

        Raises CheckpointError for a name that the family does not have and for a quantised tensor.
        """
        rename = rename or self.from_stored
        tensors: dict[str, StoredTensor] = {}
        for key, tensor in stored.items():
            if self.is_skipped(key):
                continue
            name = rename(key)
            if name is None:
                raise CheckpointError(f"{tensor.file} has {key!r}, which no supported LLaVA model has")
            if tensor.dtype not in WEIGHT_DTYPES:
                raise CheckpointError(f"{tensor.file}: {key!r} is {tensor.dtype}; load an unquantised checkpoint")
            if name in tensors:
                raise CheckpointError(
                    f"{tensor.file} has both {key!r} and {tensors[name].key!r}, which are the same tensor of the model"
                )
            tensors[name] = tensor
        return tensors

    @cached_property
    def _read(self) -> dict[str, str]:
        """Stored start or name -> ours, of all rules."""
        return {theirs: ours for rules in (*self.written.values(), self.read) for ours, theirs in rules}


def within(modules: Mapping[str, str], ours: str, stored: str) -> tuple[Rule, ...]:
    """The rules of a part whose `modules` have other names (ours -> stored), for weight (quantised or not) and bias of
    each. The part's own names are `ours` and `stored`, ending in "."."""
    return tuple(
        (f"{ours}{mine}.{leaf}", f"{stored}{theirs}.{leaf}")
        for mine, theirs in modules.items()
        for leaf in ("weight", "bias", *packing.NAMES)
    )


def _renamed(name: str, start: str, new: str) -> str | None:
    """`name` with `new` in place of the prefix `start` (or the whole name, if `start` is one); None if it does not
    match.
    """
    if name == start or (start.endswith(".") and name.startswith(start)):
        return new + name.removeprefix(start)
    return None
