"""The verdicts that this process uses, and when it may add to them.

LLAVA_FAST_SELECT is "first-use" (test a call without a verdict at its first use, within a budget), "cached" (only
existing verdicts) or "off" (no verdicts). The default is "first-use" on CUDA and "cached" on a CPU. There the native
backends are the same code on every machine, are compared with the reference by the package's tests and are the declared
defaults (`ops/backend`), so a short call never waits for a test. LLAVA_FAST_SELECTION names a file that replaces the
cached one, for bitwise reproducible results. The variables are read when an op first runs.
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
BUDGET = 30.0  # seconds that a process spends on tests, unless LLAVA_FAST_SELECT_BUDGET is set


@dataclass
class InUse:
    """Verdicts of one kind of device, by class, or by op's name for all of its calls.

    may_grow: calls without a verdict are tested. is_asked: modules call ops that may still be tested; unlike may_grow
    it does not change within a training step, since recomputed layers must run as before. classes: up to MOST_CLASSES
    computed classes, by signature. failed: classes not to be tried again.
    """

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
        """Whether no call needs to compute its class."""
        return not self.verdicts and not self.may_grow

    def serves(self, op: str) -> bool:
        """Whether some call of the op runs a backend other than the reference."""
        if not self.verdicts:  # the usual case on a CPU, asked by every module
            return False
        return any(op in (each.op, key) and each.backend != "reference" for key, each in self.verdicts.items())


class Settings:
    """This process's settings, and the tables that it has read.

    thorough: set by `llava-fast tune`: try every configuration, and test verdicts from first use again. met: if a set,
    classes are added to it instead of being tested. heard: callback with each tested class and its verdict. trains: a
    call with gradients was seen. stepped: an optimizer has stepped since the first call that could be tested. spent,
    waited: seconds so far spent on tests, and on waiting for other processes' tests.
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
        """Called after an optimizer's step: from here on nothing is tested."""
        self.stepped = True
        for table in self._tables.values():
            table.may_grow = table.is_asked = False

    def mode_on(self, device_type: str) -> str:
        """ "pinned", or one of MODES."""
        if self.pinned is not None:
            return "pinned"
        return self.mode or ("first-use" if device_type == "cuda" else "cached")

    def table(self, device: torch.device) -> InUse:
        """The verdicts for a device. Raises BackendError for a GPU of another kind than one used earlier."""
        found = self._tables.get(device)
        if found is None:
            found = self._tables[device] = self._read(device)
        return found

    def table_on(self, device_type: str) -> InUse | None:
        """The verdicts for devices of a type: those in use, else those of the current device; None without a device."""
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
    """Raise BackendError if the machines have different GPUs."""
    kinds = sorted({f"{each['device']} of {each['multiprocessors']} multiprocessors" for each in machines})
    if len(kinds) > 1:
        raise BackendError(
            f"this run has several kinds of GPU ({', '.join(kinds)}), whose verdicts would differ: pin "
            "a table for all of them (LLAVA_FAST_SELECTION=FILE), or set LLAVA_FAST_SELECT=off"
        )


@functools.cache
def settings() -> Settings:
    """The settings of this process. `settings.cache_clear()` makes the next call read the environment and the files
    again. Raises BackendError for an invalid environment variable."""
    return Settings()


def pinned_backend(op: str) -> str | None:
    """The backend that a pinned table gives to all calls of an op; None if there is none."""
    pinned = settings().pinned
    verdict = pinned.verdicts.get(op) if pinned is not None else None
    return verdict.backend if verdict is not None else None
