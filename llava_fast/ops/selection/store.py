"""Verdicts on disk: one JSON file per kind of machine in the user's cache, written atomically under a lock.

The folder is LLAVA_FAST_CACHE, else the platform's cache directory (on Linux ~/.cache/llava_fast).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llava_fast.errors import BackendError
from llava_fast.ops.selection.candidates import SERVED
from llava_fast.ops.selection.machine import Machine
from llava_fast.ops.selection.verdict import Verdict

WAIT = 60.0  # seconds that a process waits in total for other processes' tests before it uses the default


class Table(BaseModel):
    """The content of a file: the machine on which the verdicts were found (optional in a pinned table), and one verdict
    per class of calls. A key that is only an op's name applies to its calls whose class has no verdict."""

    model_config = ConfigDict(extra="forbid")

    machine: Machine = Field(default_factory=dict)
    verdicts: dict[str, Verdict] = Field(default_factory=dict)


def folder() -> Path:
    """The folder of the files; it may not exist yet."""
    given = os.environ.get("LLAVA_FAST_CACHE")
    return (Path(given).expanduser() if given else user_cache_path("llava_fast")) / "selection"


def path_of(machine: Machine) -> Path:
    """The file of one kind of machine."""
    name = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return folder() / f"{name}-{hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12]}.json"


def read_table(path: Path) -> Table:
    """Read a file. Raises BackendError if it is missing or invalid."""
    try:
        return Table.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BackendError(f"{path}: the table of verdicts cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BackendError(f"{path}: not a table of verdicts: {where}: {first['msg']}") from None


def cached(machine: Machine) -> Table:
    """The table of this kind of machine, empty if there is no file. A damaged file is ignored with a warning, since it
    is only a cache.
    """
    path = path_of(machine)
    if path.is_file():
        try:
            return _known(path, read_table(path))
        except BackendError as error:
            warnings.warn(f"{error}; its verdicts are measured again", stacklevel=2)
    return Table(machine=machine)


def _known(path: Path, table: Table) -> Table:
    """The table without verdicts for backends that the op does not have, which would fail every call."""
    known: dict[str, Verdict] = {}
    for name, verdict in table.verdicts.items():
        op = verdict.op or name.split()[0].removesuffix("_backward")
        if verdict.backend not in SERVED.get(op, {verdict.backend: ""}):
            warnings.warn(f"{path}: the op {op!r} has no backend {verdict.backend!r}; ignoring: {name}", stacklevel=3)
        else:
            known[name] = verdict
    return table.model_copy(update={"verdicts": known})


def pinned(path: Path) -> Table:
    """A table pinned by the user. Raises BackendError as `read_table`, and for launch configurations under an op's name
    alone, which no call would use."""
    table = read_table(path)
    for name, verdict in table.verdicts.items():
        if verdict.configs and " " not in name:
            raise BackendError(
                f"{path}: verdicts.{name}.configs: only a class of calls has configurations; remove them"
            )
    return table


@contextlib.contextmanager
def locked(machine: Machine, seconds: float) -> Iterator[str]:
    """Lock the machine's file for the block. Yields "held", "busy" if others held it for `seconds`, or "nowhere" if the
    folder cannot be written."""
    path = path_of(machine)
    lock = FileLock(path.with_suffix(".lock"), timeout=max(seconds, 0))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(poll_interval=0.01)  # shorter than the holder's next call, or others would never get the lock
    except Timeout:
        yield "busy"
        return
    except OSError as error:
        warnings.warn(f"{path.parent}: verdicts cannot be kept ({error}); set LLAVA_FAST_CACHE", stacklevel=3)
        yield "nowhere"
        return
    try:
        yield "held"
    finally:
        lock.release()


def keep(machine: Machine, verdicts: Mapping[str, Verdict]) -> None:
    """Add verdicts to the machine's file, replacing those of the same class. Call it inside `locked`."""
    path, table = path_of(machine), cached(machine)
    table.verdicts.update(verdicts)
    table.verdicts = dict(sorted(table.verdicts.items()))
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(table.model_dump_json(indent=1, exclude_defaults=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)
