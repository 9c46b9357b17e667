"""The output file of a batch: a JSON object a line, in the input's order, whole after any kill.

Three files. OUTPUT holds rows 0, 1, ... and nothing else, so it is always the beginning of the finished file. Rows that
are done before an earlier one wait in OUTPUT.ahead, and OUTPUT.run.json says what the batch is. A batch that goes on
reads all three: what is in OUTPUT or OUTPUT.ahead is not done again, and a torn last line is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_fast.errors import BatchError
from llava_fast.storage.files import file_written_whole
from llava_fast.storage.journal import append_whole

GO_ON = "give the same command, without --overwrite, to go on"
"""What a user does after a run that ended early."""
MOST_STALE = 8 << 20  # bytes of OUTPUT.ahead that may be in OUTPUT too


def output_files(path: str | Path) -> tuple[Path, Path, Path]:
    """OUTPUT, OUTPUT.run.json and OUTPUT.ahead."""
    return Path(path), Path(f"{path}.run.json"), Path(f"{path}.ahead")


class Output:
    """Opens the output for a batch that `about` describes: option -> value, compared with what OUTPUT.run.json says.
    `note` is written beside it and not compared.

    rows    how many rows OUTPUT holds.
    errors  how many rows of OUTPUT and OUTPUT.ahead are errors; `first_error` is one's id and message.
    last    the last row of OUTPUT as it was opened.

    Raises BatchError for an output of another batch, one that another process writes, or that cannot be written.
    """

    def __init__(
        self, path: str | Path, about: Mapping[str, Any], note: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> None:
        self.path, self.about_path, self.ahead_path = output_files(path)
        self.rows = self.errors = 0
        self.first_error: tuple[Any, str] | None = None
        self.last: dict[str, Any] | None = None
        self._waiting: dict[int, bytes] = {}
        about = json.loads(json.dumps(about))  # as it is read again
        self._check_place()
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._cannot(error) from None
        try:
            self._lock()
            if overwrite:
                os.truncate(self._file, 0)
                self.about_path.unlink(missing_ok=True)
                self.ahead_path.unlink(missing_ok=True)
            self._check_batch(about, note or {})
            self._ahead = os.open(self.ahead_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._read()
        except OSError as error:
            os.close(self._file)
            raise self._cannot(error) from None
        except BaseException:
            os.close(self._file)
            raise

    def __contains__(self, number: int) -> bool:
        """Whether the row of this number is done."""
        return number < self.rows or number in self._waiting

    @property
    def waiting(self) -> frozenset[int]:
        """Numbers of the rows that wait for an earlier one."""
        return frozenset(self._waiting)

    @property
    def done(self) -> int:
        """Rows that are done, those that wait for an earlier one too."""
        return self.rows + len(self._waiting)

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        """Write the row of this number; one that is done already is ignored. Raises BatchError, after which the output
        is as it was before."""
        if number in self:
            return
        line = _line(row)
        self._count(row)
        if number > self.rows:
            self._write(self._ahead, b"%d\t%s" % (number, line))
            self._waiting[number] = line
            return
        lines = [line]
        while (following := number + len(lines)) in self._waiting:
            lines.append(self._waiting[following])
        self._write(self._file, b"".join(lines))
        for each in range(number + 1, number + len(lines)):
            del self._waiting[each]
        self.rows += len(lines)
        if not self._waiting and os.lseek(self._ahead, 0, os.SEEK_CUR) > MOST_STALE:
            os.fsync(self._file)
            _cut(self._ahead, 0)

    def close(self) -> None:
        """Rows written so far are on the disk afterwards. OUTPUT.ahead is removed if nothing waits, and an output
        without a row."""
        try:
            os.fsync(self._file)
            if self._waiting:
                os.fsync(self._ahead)
            else:
                self.ahead_path.unlink(missing_ok=True)
            if not self.done:
                self.about_path.unlink(missing_ok=True)
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._cannot(error) from None
        finally:
            os.close(self._ahead)
            os.close(self._file)

    # ------------------------------------------------------------ opening

    def _check_place(self) -> None:
        if not self.path.parent.is_dir():
            raise BatchError(f"there is no folder {self.path.parent} for the output {self.path.name}: make it")
        if os.path.lexists(self.path) and not self.path.is_file():
            raise BatchError(f"the output {self.path} is no regular file: name one, to which a killed batch can return")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(f"another process writes {self.path}: wait for it, or name another output") from None

    def _check_batch(self, about: Mapping[str, Any], note: Mapping[str, Any]) -> None:
        is_new = os.fstat(self._file).st_size == 0 and not _size(self.ahead_path)
        if not is_new:
            self._compare(about)
            return
        text = json.dumps({"schema": "llava_fast-batch/1", "about": about, **note}, indent=1) + "\n"
        with file_written_whole(self.about_path) as new:
            new.write_text(text, encoding="utf-8")

    def _compare(self, about: Mapping[str, Any]) -> None:
        otherwise = "name another output, or begin anew with --overwrite"
        try:
            before = json.loads(self.about_path.read_text(encoding="utf-8"))["about"]
        except FileNotFoundError:
            raise BatchError(f"{self.path} is there, and no batch of llava-fast wrote it: {otherwise}") from None
        except (ValueError, KeyError, TypeError):
            raise BatchError(f"{self.about_path} is damaged, so {self.path} cannot go on: {otherwise}") from None
        for name in {**before, **about}:
            old, new = before.get(name), about.get(name)
            if old != new:
                values = f"{_short(old)} then, {_short(new)} now"
                changed = values if name.startswith("--") else "its files have changed"
                raise BatchError(
                    f"{self.path} was begun with another {name} ({changed}): give the same to go on, {otherwise}"
                )

    def _read(self) -> None:
        """Count what is done, and cut off what a kill has torn."""

        def whole(line: bytes) -> None:
            self.last = _row(line)
            self._count(self.last)
            self.rows += 1

        def ahead(line: bytes) -> None:
            number, _, rest = line.partition(b"\t")
            row = _row(rest)
            if (place := int(number)) >= self.rows and place not in self._waiting:
                self._waiting[place] = rest
                self._count(row)

        self._read_lines(self._file, self.path, whole)
        self._read_lines(self._ahead, self.ahead_path, ahead)
        following = []
        while self.rows in self._waiting:  # it was killed between the two files
            following.append(self._waiting.pop(self.rows))
            self.rows += 1
        if following:
            self._write(self._file, b"".join(following))
            self.last = _row(following[-1])

    def _read_lines(self, file: int, path: Path, take: Callable[[bytes], None]) -> None:
        """Every whole line, given to `take` with its end. What follows the last is cut off; a last line that only lacks
        its end gets it. Raises BatchError for a damaged line between others."""
        end, damaged = 0, 0
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if damaged:
                    raise BatchError(
                        f"line {damaged} of {path} is damaged: delete it and what follows to go on, or begin anew with "
                        "--overwrite"
                    )
                ended = line.endswith(b"\n")
                try:
                    take(line if ended else line + b"\n")
                except (ValueError, RecursionError):
                    damaged = number
                    continue
                end += len(line)
                if not ended:
                    os.pwrite(file, b"\n", end)
                    end += 1
        _cut(file, end)

    # ------------------------------------------------------------ writing

    def _write(self, file: int, data: bytes) -> None:
        try:
            append_whole(file, data)
        except OSError as error:
            raise self._cannot(error) from None

    def _cannot(self, error: OSError) -> BatchError:
        return BatchError(
            f"the output {self.path} cannot be written ({error.strerror or error}): mend that, then {GO_ON}"
        )

    def _count(self, row: Mapping[str, Any]) -> None:
        if "error" in row:
            self.errors += 1
            self.first_error = self.first_error or (row["id"], str(row["error"]))


def _row(line: bytes) -> dict[str, Any]:
    """Raises ValueError for what is no row."""
    row = json.loads(line)
    if not isinstance(row, dict) or "id" not in row:
        raise ValueError("no row of an output")
    return row


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, as in a file name that is not UTF-8
        return json.dumps(row).encode() + b"\n"


def _cut(file: int, size: int) -> None:
    os.truncate(file, size)
    os.lseek(file, size, os.SEEK_SET)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "..."
