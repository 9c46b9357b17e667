"""Which implementation of an op runs: chosen per process by LLAVA_FAST_BACKEND (read when an op first runs), per block
by `use_backend`.

"auto" uses the backend that selection found correct and fastest for this class of calls on this machine
(`ops/selection`), or the op's default if there is no verdict. Requesting a backend that does not support a call is an
error, never a silent fallback.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator, Mapping

from llava_fast.errors import BackendError
from llava_fast.ops.selection import tables
from llava_fast.ops.selection.candidates import SERVED
from llava_fast.ops.selection.decision import Decision, current
from llava_fast.ops.triton_support import interpreting

BACKENDS = ("auto", "triton", "native", "reference")
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("llava_fast_backend", default=None)
_open: dict[object, str] = {}  # the backends of all open blocks, in any thread
_defaults: dict[tuple[str, str], list[str]] = {}
_noted: contextvars.ContextVar[list[tuple[str, str]] | None] = contextvars.ContextVar("llava_fast_noted", default=None)


def register(op: str, backend: str, devices: str, default_on: tuple[str, ...] = ()) -> None:
    """Record that `op` has `backend`; `devices` is the phrase that `doctor` prints.

    default_on: device types ("cpu") on which "auto" uses it without a verdict; of several such backends of an op, the
    first registered that supports the call. Only for backends whose code is the
    same on every such machine and is compared with the reference by the package's tests. Elsewhere the default is the
    reference.
    """
    SERVED.setdefault(op, {})[backend] = devices
    for device in default_on:
        _defaults.setdefault((op, device), []).append(backend)


def served() -> dict[str, dict[str, str]]:
    """Op -> backend -> devices, for `llava-fast doctor`."""
    return {op: dict(backends) for op, backends in SERVED.items()}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the block on backend `name` ("auto", "triton", "native", "reference").

    A thread without its own block follows the most recently opened one, because autograd runs a CUDA backward pass on
    its own threads, which do not inherit the context.
    """
    token, block = _chosen.set(_checked(name)), object()
    _open[block] = name
    try:
        yield
    finally:
        del _open[block]
        _chosen.reset(token)


@contextlib.contextmanager
def noted() -> Iterator[list[tuple[str, str]]]:
    """Gives a list that grows by (op, backend) at each call in this thread inside the block, except by selection's
    tests."""
    calls: list[tuple[str, str]] = []
    token = _noted.set(calls)
    try:
        yield calls
    finally:
        _noted.reset(token)


def requested() -> str:
    """The backend requested by `use_backend` or LLAVA_FAST_BACKEND; "auto" if none is."""
    mine = _chosen.get()
    if mine is None and _open:
        mine = next(reversed(_open.values()), None)
    return mine or of_process()


@functools.cache
def of_process() -> str:
    """LLAVA_FAST_BACKEND, read when an op first runs. Raises BackendError for an unknown name."""
    return _checked(os.environ.get("LLAVA_FAST_BACKEND", "auto"))


def choose(op: str, device: str = "", unfit: Mapping[str, str | None] | None = None) -> str:
    """The backend that `op` uses now for tensors on a device of this type.

    unfit: backend -> why it does not support this call (None or absent: it does). "auto" falls back to the reference;
    a requested backend that does not support the op or this call raises BackendError.
    """
    decision, calls = current(), _noted.get()
    found = _backend_of(op, device, unfit or {}, decision)
    if calls is not None and not (decision is not None and decision.is_trial):
        calls.append((op, found))
    return found


def _backend_of(op: str, device: str, unfit: Mapping[str, str | None], decision: Decision | None) -> str:
    name = requested()
    if name == "auto" and decision is not None and decision.is_trial:
        decision.asked.append(op)
        name = decision.backend
    if name == "auto":
        if decision is None:
            return first_fit(op, device, unfit)
        return "reference" if unfit.get(decision.backend) else _known(op, decision.backend)
    _known(op, name)
    if name in ("triton", "cublas") and not _has_triton():
        raise BackendError(f"backend {name!r} needs triton, which is not installed: pip install triton (on Linux)")
    if unfit.get(name):
        raise BackendError(f"backend {name!r} cannot run this {op}: {unfit[name]}; use 'auto'")
    return name


def default(op: str, device: str) -> str:
    """The backend of `op` on a device of this type for calls without a verdict."""
    return first_fit(op, device, {})


def first_fit(op: str, device: str, unfit: Mapping[str, str | None]) -> str:
    """The backend of `op` for a call without a verdict, given why others do not support it."""
    pinned = tables.pinned_backend(op)
    for name in [_known(op, pinned)] if pinned else _defaults.get((op, device), []):
        if not unfit.get(name):
            return name
    return "reference"


def _known(op: str, name: str) -> str:
    if name not in SERVED.get(op, {}):
        known = ", ".join(SERVED.get(op, {})) or "none"
        raise BackendError(f"backend {name!r} does not serve the op {op!r} (it has: {known}); use 'auto'")
    return name


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def serves(op: str, device: str) -> bool:
    """Whether the backend in use has a kernel of `op` for this type of device, or may find one at first use. The
    reference does not count: it runs the same steps as the modules it would replace, plus about 20 microseconds of
    call overhead.
    """
    name = requested()
    if name != "auto":
        return name != "reference" and name in SERVED.get(op, {})
    if default(op, device) != "reference":
        return True
    table = tables.settings().table_on(device)
    if table is None:
        return False
    return table.serves(op) or (table.is_asked and bool(_forms_on(device) & SERVED.get(op, {}).keys()))


def _forms_on(device: str) -> set[str]:
    """The compiled backends that can run on a device of this type."""
    triton = _has_triton() and (device == "cuda" or interpreting())
    return {"native"} | ({"triton", "cublas"} if triton else set())


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    return name
