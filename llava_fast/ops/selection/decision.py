"""Selection's thread-local decision for the running operator: which form, with which configurations."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Config = Mapping[str, int]
_here = threading.local()


@dataclass(frozen=True)
class Decision:
    """A form of an op, and launch configurations of its Triton kernels by name (absent: those of the tables).

    is_trial: it is being tested, so a form that does not support the call raises BackendError, and operators called
    inside run the same form. `asked` and `kernels` then record what was chosen for, in order.
    """

    backend: str
    configs: Mapping[str, Config] = field(default_factory=dict)
    is_trial: bool = False
    asked: list[str] = field(default_factory=list)
    kernels: dict[str, Config] = field(default_factory=dict)


def current() -> Decision | None:
    """The decision for the running operator; None outside of operators and if nothing was decided."""
    return getattr(_here, "decision", None)


@contextlib.contextmanager
def decided(decision: Decision | None) -> Iterator[None]:
    """Inside the block, operators of this thread follow the decision."""
    before = current()
    _here.decision = decision
    try:
        yield
    finally:
        _here.decision = before
