"""The verdicts that this process uses, and when it may add to them.

LLAVA_FAST_SELECT says how: "first-use" (a call without a verdict is tested at its first use, within a budget), "cached"
(only existing verdicts), "off" (none). Unset, it is "first-use" on CUDA and "cached" on a CPU: there the native forms
are the same code on every machine, compared with the reference by the package's tests, and are the declared defaults
(`ops/backend`), so that a short call never waits for a test. LLAVA_FAST_SELECTION names a file that replaces the
cache's, for results that repeat bit for bit. All are read when an op first runs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llava_fast.errors import BackendError
from llava_fast.ops.selection import store
from llava_fast.ops.selection.machine import Machine, machine_of
from llava_fast.ops.selection.verdict import Verdict

MODES = ("first-use", "cached", "off")
MOST_CLASSES = 4096
BUDGET = 30.0  # seconds that a process spends on proofs, unless LLAVA_FAST_SELECT_BUDGET says otherwise


@dataclass
class InUse:
    """Verdicts of one kind of device, by class; under an op's name, those of all its calls. `may_grow`: calls are
    proven. `is_asked`: modules leave their place to ops that may be proven; unlike `may_grow` it does not change within
    a training step, where layers that are run again must run as before. `classes` keeps up to MOST_CLASSES classes
    worked out already, by signature; `failed` those not to be tried again."""

    machine: Machine
    verdicts: dict[str, Verdict]
    may_grow: bool
    classes: dict[tuple, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    is_asked: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_asked = self.may_grow

    @property
    def is_idle(self) -> bool:
        """Whether no call needs its class."""
        return not self.verdicts and not self.may_grow

    def serves(self, op: str) -> bool:
        """Whether some call of the op runs another form than the reference."""
        if not self.verdicts:  # the usual case on a CPU, asked by every module
            return False
        return any(op in (each.op, key) and each.backend != "reference" for key, each in self.verdicts.items())


class Settings:
    """This process's settings, and the tables that it has read.

    thorough: `llava-fast tune` runs: every configuration is tried, and verdicts from first use are tested again. met:
    if it is a set, classes that would be tested are added to it instead. heard: called with each class that was tried
    and its verdict. trains: a call with gradients was seen. stepped: an optimizer has made a step since the first call
    that could be tested. spent, waited: seconds of tests, and of waiting for other processes' tests, so far.
    """

    def __init__(self) -> None:
        self.mode = os.environ.get("LLAVA_FAST_SELECT") or None
        if self.mode not in (None, *MODES):
            raise BackendError(f"LLAVA_FAST_SELECT={self.mode}: choose one of {', '.join(MODES)}")
        pinned = os.environ.get("LLAVA_FAST_SELECTION")
        self.pinned = store.pinned(Path(pinned).expanduser()) if pinned else None
        given = os.environ.get("LLAVA_FAST_SELECT_BUDGET") or BUDGET
        try:
            self.budget = float(given)
        except ValueError:
            raise BackendError(f"LLAVA_FAST_SELECT_BUDGET={given}: give a number of seconds") from None
        self.spent = self.waited = 0.0
        self.thorough = self.trains = self.stepped = False
        self.met: set[str] | None = None
        self.heard: Callable[[str, Verdict | None], None] = lambda name, verdict: None
        self._tables: dict[torch.device, InUse] = {}

    def end_step(self) -> None:
        """An optimizer has made a step: from here on nothing is proven."""
        self.stepped = True
        for table in self._tables.values():
            table.may_grow = table.is_asked = False

    def mode_on(self, device_type: str) -> str:
        """ "pinned", or one of MODES."""
        if self.pinned is not None:
            return "pinned"
        return self.mode or ("first-use" if device_type == "cuda" else "cached")

    def table(self, device: torch.device) -> InUse:
        """The verdicts for a device. Raises BackendError for a GPU of another kind than an earlier one's."""
        found = self._tables.get(device)
        if found is None:
            found = self._tables[device] = self._read(device)
        return found

    def table_on(self, device_type: str) -> InUse | None:
        """The verdicts for devices of a type, of the current one if none was asked for yet; None if there is none."""
        for device, table in self._tables.items():
            if device.type == device_type:
                return table
        if device_type == "cuda":
            here = torch.cuda.is_available() and torch.device("cuda", torch.cuda.current_device())
            return self.table(here) if here else None
        return self.table(torch.device(device_type))

    def _read(self, device: torch.device) -> InUse:
        mode = self.mode_on(device.type)
        if self.pinned is not None:
            return InUse(self.pinned.machine, self.pinned.verdicts, False)
        if mode == "off" or (device.type == "cpu" and mode == "cached" and not any(store.folder().glob("*.json"))):
            return InUse({}, {}, False)
        machine = machine_of(device)
        for other, table in self._tables.items():
            if other.type == device.type == "cuda":
                check_one_kind([table.machine, machine])
                return table
        return InUse(machine, store.cached(machine).verdicts, mode == "first-use" and not self.stepped)


def check_one_kind(machines: Sequence[Machine]) -> None:
    """Raises BackendError if they are GPUs of several kinds."""
    kinds = sorted({f"{each['device']} of {each['multiprocessors']} multiprocessors" for each in machines})
    if len(kinds) > 1:
        raise BackendError(
            f"this run has several kinds of GPU ({', '.join(kinds)}), whose verdicts would differ: pin "
            "a table for all of them (LLAVA_FAST_SELECTION=FILE), or set LLAVA_FAST_SELECT=off"
        )


@functools.cache
def settings() -> Settings:
    """Those of this process; `settings.cache_clear()` has the environment and the files read again. Raises BackendError
    for an environment variable with a wrong value."""
    return Settings()


def pinned_backend(op: str) -> str | None:
    """The form that a pinned table gives to all calls of an op."""
    pinned = settings().pinned
    verdict = pinned.verdicts.get(op) if pinned is not None else None
    return verdict.backend if verdict is not None else None
