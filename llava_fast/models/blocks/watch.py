"""Whether the modules that a CUDA graph stands for are still those that it was captured from."""

from __future__ import annotations

from torch import nn

from llava_fast.models.blocks.native_step import Snapshot
from llava_fast.models.cuda_graphs import addresses_of


class Watch:
    """Modules, and since when they are the same. `unfit` says why no graph may stand for them: a hooked module, or one
    that is neither this package's nor a plain one of PyTorch."""

    def __init__(self, *modules: nn.Module) -> None:
        self.unfit: str | None = None
        self._modules = nn.ModuleList(modules)
        self._snapshot: Snapshot | None = None
        self._addresses: list[int] = []

    def changed(self, *others: int) -> bool:
        """Whether a module, hook, parameter object or address has changed since the last call, or one of the `others`,
        addresses of what else a graph reads. True at the first call, and at each while there are hooks."""
        addresses = [*others, *addresses_of(self._modules)]
        if self._snapshot is not None and self._snapshot.holds() and addresses == self._addresses:
            return False
        snapshot = self._snapshot = Snapshot(self._modules, frozenset(), whole=True)
        self._addresses, self.unfit = addresses, None
        if not snapshot.holds():
            self.unfit = "a module has a hook or a forward of its own"
            self._snapshot = None  # so that the next call looks again
        elif strange := sorted(kind.__name__ for kind in snapshot.kinds if not _keeps_no_switch(kind)):
            self.unfit = f"a module may choose anew at each call what it does ({', '.join(strange)})"
        return True


def _keeps_no_switch(kind: type) -> bool:
    """Whether modules of a type do the same at each call, so that a graph may stand for them: this package's and
    PyTorch's plain ones. Others, as PEFT's, turn adapters on and off by attributes that nothing here compares."""
    return kind.__module__.startswith("llava_fast.") or kind in _PLAIN


_PLAIN = (
    nn.Conv2d,
    nn.Embedding,
    nn.GELU,
    nn.Identity,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
    nn.Sequential,
    nn.SiLU,
)
