"""One pass over the data before training: the length of each sample, and its problem, if any.

Worker processes tokenise each sample and read its images' sizes (or, on request, decode their pixels). Results are
cached on disk for restarted runs and for runs after `llava-fast data check`.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from llava_fast.errors import DataError, ImageError, MissingFileError, RequestError
from llava_fast.inputs.pictures.headers import image_size
from llava_fast.inputs.pictures.reading import open_image
from llava_fast.inputs.pictures.video import frame_count, read_video
from llava_fast.inputs.processor import Processor
from llava_fast.storage.files import file_written_whole
from llava_fast.train.data.samples import SampleTable
from llava_fast.train.data.workers import in_workers
from llava_fast.version import __version__

LabelMask = Literal["answers", "original"]
_CHUNK = 32  # samples per work item
_PLAIN_SETTINGS = (
    "geometry",
    "image_token_id",
    "video_token_id",
    "template",
    "exif",
    "video_frames",
    "video_fps",
    "repeats_images",
    "image_turns",
    "time_instruction",
)


@dataclass(frozen=True)
class Lengths:
    """Rows of each sample, int32 [n]: `text`, `visual`, and the `supervised` ones among the text rows.

    problems  sample number -> description of its problem; such a sample's rows are 0.
    kinds     sample number -> kind of its problem: "missing file", "unreadable file", "roles and turns",
              "placeholders", "malformed", "cannot be masked", "unexpected".
    """

    text: np.ndarray
    visual: np.ndarray
    supervised: np.ndarray
    problems: dict[int, str]
    kinds: dict[int, str]


class _Found(NamedTuple):
    """The result for one sample."""

    number: int
    text: int = 0
    visual: int = 0
    supervised: int = 0
    kind: str = ""
    problem: str = ""


def measure(
    table: SampleTable,
    processor: Processor | None,
    labels: LabelMask,
    workers: int,
    cache: Path | None = None,
    *,
    decode: bool = False,
    again: bool = True,
    progress: bool = True,
) -> Lengths:
    """Measure all samples of a table.

    processor  of the model to train; its `max_rows` is ignored. None: only find problems; all rows are 0.
    workers    number of worker processes; 0: use this process.
    cache      directory of cached results, keyed by a hash of the data and of the processor's settings.
    again      measure cached samples with a problem again, since their files may have been fixed.
    decode     decode every image and video to find truncated files, instead of reading only headers.
    """
    kept = None if cache is None else Path(cache) / f"{_key(table, processor, labels)}.npz"
    found = None if kept is None else _read(kept, len(table), decode)
    if found is None:
        found = _Kept(_lengths(np.zeros((3, len(table)), np.int32), {}, {}), decode)
        todo: Sequence[int] = range(len(table))
    else:
        todo = sorted(found.lengths.problems) if again else []
    if todo:
        chunks = _Chunks(table, processor, labels, found.decoded, todo)
        found = _Kept(_merged(found.lengths, _run(chunks, workers, progress)), found.decoded)
        if kept is not None:
            _write(kept, found)
    return found.lengths


class _Chunks(Dataset):
    """The measurements as a Dataset of chunks of samples."""

    def __init__(
        self, table: SampleTable, processor: Processor | None, labels: LabelMask, decode: bool, numbers: Sequence[int]
    ) -> None:
        self.table, self.processor, self.labels, self.decode, self.numbers = table, processor, labels, decode, numbers

    def __len__(self) -> int:
        return math.ceil(len(self.numbers) / _CHUNK)

    def __getitem__(self, chunk: int) -> list[_Found]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings for irregular files that it can read
            return [self._measured(number) for number in self.numbers[chunk * _CHUNK : (chunk + 1) * _CHUNK]]

    def _measured(self, number: int) -> _Found:
        try:
            request = self.table[number].request
            if self.decode or self.processor is None:  # otherwise count() reads the headers
                self._open(request["images"], request.get("video"))
            if self.processor is None:
                return _Found(number)
            return _Found(number, *self.processor.count(request, self.labels))
        except MemoryError:
            raise
        except Exception as error:  # no error of one sample may stop the others
            kind, problem = described(self.table.name(number), error)
            return _Found(number, kind=kind, problem=problem)

    def _open(self, pictures: Sequence[str], video: str | None) -> None:
        exif, frames = (self.processor.exif, self.processor.chosen_frames) if self.processor else (True, 1)
        for picture in pictures:
            if self.decode:
                open_image(picture, exif)
            else:
                image_size(picture, exif)
        if video is not None and self.decode:
            read_video(video, frames)
        elif video is not None:
            frame_count(video, frames)


def described(name: str, error: Exception) -> tuple[str, str]:
    """(kind, description) of a sample's problem; the description is one line that begins with the sample's name."""
    kind, problem = _kind_and_words(error)
    problem = " ".join(problem.split())
    return kind, problem if problem.startswith(name) else f"{name}: {problem}"


def _kind_and_words(error: Exception) -> tuple[str, str]:
    if isinstance(error, DataError):
        return error.kind, str(error)
    for types, kind in (
        (MissingFileError, "missing file"),
        (ImageError, "unreadable file"),
        (RequestError, "cannot be masked"),
    ):
        if isinstance(error, types):
            return kind, str(error)
    if isinstance(error, OSError):
        return "unreadable file", str(error)
    return "unexpected", f"{type(error).__name__}: {error}"


def _run(chunks: _Chunks, workers: int, progress: bool) -> list[_Found]:
    loader = in_workers(chunks, range(len(chunks)), min(workers, len(chunks)))
    found: list[_Found] = []
    what = "reading samples and images" if chunks.decode else "measuring samples"
    with tqdm(total=len(chunks.numbers), desc=what, unit=" samples", disable=not progress, dynamic_ncols=True) as bar:
        for each in loader:
            found += each
            bar.update(len(each))
    return found


# ---------------------------------------------------------------- kept on disk


class _Kept(NamedTuple):
    """The content of a cache file: lengths, and whether images were decoded for them."""

    lengths: Lengths
    decoded: bool


def _merged(old: Lengths, found: list[_Found]) -> Lengths:
    """`old` updated with newer results."""
    rows = np.stack([old.text, old.visual, old.supervised])
    problems, kinds = dict(old.problems), dict(old.kinds)
    for number, *counts, kind, problem in found:
        rows[:, number] = counts
        problems.pop(number, None)
        kinds.pop(number, None)
        if problem:
            problems[number], kinds[number] = problem, kind
    return _lengths(rows, problems, kinds)


def _lengths(rows: np.ndarray, problems: dict[int, str], kinds: dict[int, str]) -> Lengths:
    """rows: int32 [3, n], text, visual and supervised."""
    order = sorted(problems)
    return Lengths(rows[0], rows[1], rows[2], {i: problems[i] for i in order}, {i: kinds[i] for i in order})


def _key(table: SampleTable, processor: Processor | None, labels: LabelMask) -> str:
    """A hash of everything on which lengths depend, except the sizes of the images."""
    settings: list[Any] = [__version__, table.fingerprint(), labels]
    if processor is not None:
        settings += [repr(getattr(processor, name)) for name in _PLAIN_SETTINGS]
        more = [each.name for each in fields(processor) if each.name not in Processor.__dataclass_fields__]
        settings.append([type(processor).__name__, *(f"{name}={getattr(processor, name)!r}" for name in more)])
        tokenizer = processor.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        settings.append(backend.to_str() if backend else sorted(tokenizer.get_vocab().items()))
        settings.append([repr(tokenizer.special_tokens_map), type(tokenizer).__name__])
    return hashlib.blake2b(json.dumps(settings).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _read(path: Path, count: int, decode: bool) -> _Kept | None:
    """The cached result, if it is complete and, if `decode` is set, its images were decoded."""
    try:
        with np.load(path, allow_pickle=False) as held:
            rows = held["rows"]
            notes = json.loads(str(held["notes"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if rows.shape != (3, count) or (decode and not notes["decoded"]):
        return None
    problems = {int(number): text for number, text in notes["problems"].items()}
    kinds = {int(number): kind for number, kind in notes["kinds"].items()}
    return _Kept(_lengths(rows, problems, kinds), notes["decoded"])


def _write(path: Path, kept: _Kept) -> None:
    lengths = kept.lengths
    notes = json.dumps({"decoded": kept.decoded, "problems": lengths.problems, "kinds": lengths.kinds})
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_written_whole(path) as new, new.open("wb") as file:
        np.savez(file, rows=np.stack([lengths.text, lengths.visual, lengths.supervised]), notes=np.array(notes))
