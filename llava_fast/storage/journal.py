"""An append-only file of finished work (JSON lines with keys), so that an interrupted run loses no finished work.

If a process is killed, only the last line can be incomplete. It is removed when the file is opened again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from llava_fast.errors import DataError, LlavaFastError

if TYPE_CHECKING:
    from typing_extensions import Self


class Journal:
    """Objects by their "key", read from the file on access. Only one process at a time can open it.

    unreadable  number of lines that are not JSON, for example after a crash, or for which `is_entry` raises
                ValueError. They are ignored, so that their work is repeated.

    Raises `error` if the file cannot be opened or another process has opened it.
    """

    error: type[LlavaFastError] = DataError

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.unreadable = 0
        self._places: dict[str, tuple[int, int]] = {}
        self._lock = FileLock(f"{self.path}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise self.error(f"another process writes {self.path}: wait for it, or end it") from None
        except OSError as error:
            raise self.error(f"{self.path} cannot be opened: {error.strerror or error}") from None
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            self._lock.release()
            raise self.error(f"{self.path} cannot be opened: {error.strerror or error}") from None
        self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            try:
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            raise self.error(f"{self.path} cannot be written: {error.strerror or error}") from None
        finally:
            self._lock.release()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def entry(self, key: str) -> dict[str, Any] | None:
        """Return the newest object of this key, or None."""
        if key not in self._places:
            return None
        at, length = self._places[key]
        return json.loads(os.pread(self._file, length, at))

    def append(self, entry: dict[str, Any], secret: str = "") -> None:
        """Append an object with a "key". Every occurrence of `secret` (an API key) in it is replaced by ***.

        Raises `error` if it cannot be written.
        """
        data = without(json.dumps(entry), secret).encode() + b"\n"  # ASCII, which also represents lone surrogates
        try:
            at = append_whole(self._file, data)
        except OSError as error:
            raise self.error(f"{self.path} cannot be written: {error.strerror or error}") from None
        if self.is_entry(entry):
            self._places[str(entry["key"])] = (at, len(data))

    def is_entry(self, entry: Any) -> bool:
        """Return True for finished work and False for a note. Raises ValueError for anything else."""
        if not isinstance(entry, dict) or "key" not in entry:
            raise ValueError("it has no key")
        return True

    def _read(self) -> None:
        """Index the lines, and remove an incomplete last line."""
        at = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, at)
                    break
                try:
                    entry = json.loads(line)
                    if self.is_entry(entry):
                        self._places[str(entry["key"])] = (at, len(line))
                except (ValueError, RecursionError):  # JSON's errors are ValueErrors
                    self.unreadable += 1
                at += len(line)


def append_whole(file: int, data: bytes) -> int:
    """Append all of `data` to an open file and return where it begins. If that fails, the file is as before, and the
    OSError is raised."""
    at, left = os.lseek(file, 0, os.SEEK_END), memoryview(data)
    try:
        while left:
            left = left[os.write(file, left) :]
    except OSError:
        os.ftruncate(file, at)
        raise
    return at


def file_identity(path: Path) -> list[Any]:
    """What a key of work on a file holds, so that a changed file, or one of the same name elsewhere, is new work: its
    absolute path, size in bytes and time of change. The last two are missing if there is no such file."""
    absolute = os.path.abspath(path)
    try:
        about = os.stat(absolute)
    except (OSError, ValueError):  # ValueError: a null byte
        return [absolute]
    return [absolute, about.st_size, about.st_mtime_ns]


def without(text: str, secret: str) -> str:
    """Return `text` with *** instead of the secret, if that has at least eight characters."""
    return text.replace(secret, "***") if len(secret) >= 8 else text
