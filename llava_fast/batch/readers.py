"""The rows of one table: dicts, and problems in place of rows that cannot be read."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from llava_fast.errors import BatchError, MissingPackageError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
GROUP = 64  # rows of parquet in memory at once: they may hold pictures


class Problem(str):
    """Why a row is no row."""


Row = Mapping[str, Any] | Problem


def read_rows(path: str, first: int, columns_only: tuple[str, ...] = ()) -> Iterator[Row | int]:
    """The rows of a table from number `first` on, after the number of rows that were skipped. `columns_only`: values of
    these columns are enough, and None may stand for all others. Raises BatchError for a file that cannot be read."""
    suffix = path.lower().rpartition(".")[2]
    try:
        if suffix == "parquet":
            yield from _parquet(path, first, columns_only)
            return
        rows = {"csv": _csv, "tsv": _csv, "json": _json}.get(suffix, _json_lines)(path)
        yield sum(1 for _ in itertools.islice(rows, first))
        yield from rows
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise BatchError(f"{path} is not UTF-8 (there is a byte 0x{byte:02x}): convert it") from None


def _json_lines(path: str) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if text := line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                yield _object(text, f"line {number}")


def _object(text: bytes, where: str) -> Row:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # text that is not UTF-8 too
        return Problem(f"{where} is no JSON: {error}")
    return row if isinstance(row, dict) else Problem(f"{where} is no JSON object")


def _json(path: str) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        try:
            rows = json.load(file)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise BatchError(f"{path} is no JSON ({error}): one object a line is called .jsonl") from None
    if not isinstance(rows, list):
        raise BatchError(f"{path} holds no list of rows, but a JSON {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield row if isinstance(row, dict) else Problem(f"item {number} of the list is no JSON object")


def _csv(path: str) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # a field may be a data URI
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if double := [name for name in header if header.count(name) > 1]:
                raise BatchError(f"{path} has two columns {double[0]!r}: rename one")
            for row in reader:
                if not row:  # an empty line
                    continue
                if len(row) == len(header):
                    yield dict(zip(header, row, strict=True))
                else:
                    yield Problem(f"line {reader.line_num} has {len(row)} fields and the header {len(header)}")
        except csv.Error as error:
            raise BatchError(f"{path}, line {reader.line_num}: {error}") from None


def _parquet(path: str, first: int, columns_only: tuple[str, ...]) -> Iterator[Row | int]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError("a parquet file", "pyarrow", "parquet") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in columns_only if name in names] if columns_only else names
            others = dict.fromkeys(names)
            skipped = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if skipped + rows <= first:
                    skipped += rows
                    yield rows
                    continue
                if not wanted:  # the number of rows says all
                    yield from itertools.repeat(others, rows)
                    continue
                for batch in file.iter_batches(GROUP, row_groups=[group], columns=wanted):
                    away = min(max(0, first - skipped), len(batch))
                    skipped += away
                    if away:
                        yield away
                    yield from ({**others, **row} for row in batch.slice(away).to_pylist())
    except pyarrow.ArrowException as error:
        raise BatchError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from None
