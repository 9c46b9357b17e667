"""Selection's thread-local decision for the running operator: which backend, with which configurations."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Config = Mapping[str, int]
_here = threading.local()


@dataclass(frozen=True)
class Decision:
    """A backend of an op, and launch configurations of its Triton kernels by name (absent: those of the tables).

    is_trial: the backend is being tested. If it does not support the call, the call raises BackendError; operators
    called inside use the same backend. `asked` and `kernels` record the ops and kernels that ran, in order.
    """

    backend: str
    configs: Mapping[str, Config] = field(default_factory=dict)
    is_trial: bool = False
    asked: list[str] = field(default_factory=list)
    kernels: dict[str, Config] = field(default_factory=dict)


def current() -> Decision | None:
    """The decision for the running operator; None outside operators and without a decision."""
    return getattr(_here, "decision", None)


@contextlib.contextmanager
def decided(decision: Decision | None) -> Iterator[None]:
    """Make this thread's operators follow the decision inside the block."""
    before = current()
    _here.decision = decision
    try:
        yield
    finally:
        _here.decision = before
