"""Which implementation of an op runs: per process by LLAVA_FAST_BACKEND, per block by `use_backend`.

"auto" takes the best one that is proven for the device; naming a backend that cannot serve a call is an error,
never a silent fall-back. Today every op has the "reference" backend alone; Triton and csrc kernels register theirs
with `serves`.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

BACKENDS = ("auto", "triton", "native", "reference")
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("llava_fast_backend", default=None)
_served: dict[str, dict[str, str]] = {}


class BackendError(RuntimeError):
    """The chosen backend cannot serve this call."""


def register(op: str, backend: str, devices: str) -> None:
    """Record that `op` has `backend`, with a phrase for `doctor` on which devices."""
    _served.setdefault(op, {})[backend] = devices


def served() -> dict[str, dict[str, str]]:
    """Op -> backend -> devices, for `llava-fast doctor`."""
    return {op: dict(backends) for op, backends in _served.items()}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the block on backend `name` ("auto", "triton", "native", "reference")."""
    token = _chosen.set(_checked(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def choose(op: str) -> str:
    """The backend `op` uses now. Raises BackendError when the one asked for does not serve it."""
    name = _chosen.get() or _checked(os.environ.get("LLAVA_FAST_BACKEND", "auto"))
    if name == "auto":
        return "reference"
    if name not in _served.get(op, {}):
        known = ", ".join(_served.get(op, {})) or "none"
        raise BackendError(f"backend {name!r} does not serve the op {op!r} (it has: {known}); use 'auto'")
    return name


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return name
