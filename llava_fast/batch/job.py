"""A batch from its input to its output: what is left to do, done in one process or on a Ray cluster."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from tqdm import tqdm

from llava_fast.api import load
from llava_fast.batch.answering import Answerer, Row, Settings
from llava_fast.batch.digest import model_digest
from llava_fast.batch.items import Item, Source
from llava_fast.batch.output import Output, output_files
from llava_fast.batch.prompts import choose_template
from llava_fast.errors import BatchError
from llava_fast.generation.llava import Llava
from llava_fast.storage.hub import local_directory, resolve
from llava_fast.version import __version__

Steps = Iterator[list[tuple[int, Row]]]


@dataclass(frozen=True)
class ModelSpec:
    """What `load` is given, on whichever machine the model is loaded."""

    path: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def anywhere(self) -> ModelSpec:
        """The same for a process with another working directory."""
        path = self.path if local_directory(self.path) is None else os.path.abspath(os.path.expanduser(self.path))
        return replace(self, path=path)

    def load(self) -> Llava:
        return load(self.path, **self.options)

    def about(self) -> dict[str, Any]:
        """What of it decides the answers, as Output compares it. Raises CheckpointError."""
        options = {f"--{name.replace('_', '-')}": value for name, value in self.options.items() if name != "model_base"}
        device = self.options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        options["--device"] = str(device).partition(":")[0]
        base = self.options.get("model_base")
        try:
            digests = {
                name: model_digest(resolve(path)) for name, path in (("MODEL", self.path), ("model base", base)) if path
            }
        except OSError as error:
            raise BatchError(f"the files of {self.path} cannot be read: {error}") from None
        return {**digests, **options}


@dataclass(frozen=True)
class Result:
    """How a batch ended.

    rows      rows of the output; `errors` of them are errors.
    answered  rows that this run made, in `seconds`, the model's loading left out.
    finished  False: it was stopped before its last row.
    """

    rows: int
    errors: int
    first_error: tuple[Any, str] | None
    answered: int
    seconds: float
    finished: bool


class Runs(Protocol):
    """Where answers are made: in this process (`in_process`), or on Ray's workers (cluster.Cluster)."""

    def __call__(
        self, model: ModelSpec, settings: Settings, source: Source, first: int, limit: int | None, output: Output
    ) -> Steps: ...


def in_process(
    model: ModelSpec, settings: Settings, source: Source, first: int, limit: int | None, output: Output
) -> Steps:
    """Rows as they end, of items from number `first` on that the output does not have."""
    items = itertools.islice(source.items(first), None if limit is None else limit - first)
    waiting = output.waiting  # of an earlier run; read in another thread than the one that writes
    return Answerer(model.load(), settings).steps(item for item in items if item.number not in waiting)


def run(
    model: ModelSpec,
    source: Source,
    path: str,
    settings: Settings,
    *,
    limit: int | None = None,
    overwrite: bool = False,
    runs: Runs = in_process,
    say: Callable[[str], None] = print,
) -> Result:
    """Answer the first `limit` items of the input (None: all), in the input's order, into the file `path`; what it has
    already is not done again. Ctrl-C and SIGTERM end it after the step that runs.

    Raises BatchError for an output that is a file of the input or of another batch, a prompt that names a missing
    column, or a failing device, and what loading the model raises.
    """
    _check_apart(source, path)
    template = choose_template(settings.prompt, source.columns)
    settings = replace(settings, prompt=template.text, repeats=source.repeats)
    about = {"INPUT": source.digest, **model.about(), **_about(settings)}
    note = {"llava_fast": __version__, "model": model.path}
    output = Output(path, about, note, overwrite)
    with closing(output), _stopping() as stop:
        first = output.rows
        _check_last(source, output)
        total = source.total if limit is None else limit if source.total is None else min(limit, source.total)
        if output.done:
            say(f"{output.done} rows are in {path} already")
        if source.remark:
            say(source.remark)
        nothing_left = (limit is not None and first >= limit) or next(source.items(first), None) is None
        if nothing_left and not first:
            raise BatchError("the input has no rows")
        if nothing_left:
            return Result(output.rows, output.errors, output.first_error, 0, 0.0, True)
        before = output.done
        steps = runs(model, settings, source, first, limit, output)
        started = time.monotonic()
        with closing(steps), tqdm(total=total, initial=before, unit="row", dynamic_ncols=True, disable=None) as bar:  # type: ignore[type-var]
            for rows in steps:
                for number, row in rows:
                    output.add(number, row)
                if rows:
                    bar.update(output.done - bar.n)
                    if output.errors:
                        bar.set_postfix(errors=output.errors, refresh=False)
                if stop.is_set():
                    break
        seconds = time.monotonic() - started
        return Result(output.done, output.errors, output.first_error, output.done - before, seconds, not stop.is_set())


def _about(settings: Settings) -> dict[str, Any]:
    """What of the settings decides the answers, by the names of the command's options."""
    sampling = asdict(settings.sampling)
    grammar = sampling.pop("grammar")
    return {
        "--prompt": settings.prompt,
        "--system": settings.system,
        "--schema": grammar and grammar["text"],
        "--literal-text": settings.literal_text,
        "--video-frames": settings.video_frames,
        "--batch-invariant": settings.batch_invariant,
        **{f"--{name.replace('_', '-')}": value for name, value in sampling.items() if value is not None},
    }


def _check_apart(source: Source, path: str) -> None:
    """Raises BatchError where the output, or a file beside it, is one that the input reads: it would be overwritten."""
    ours = {(about.st_dev, about.st_ino): file for file in output_files(path) if (about := _stat(file)) is not None}
    for file in source.files if ours else ():
        about = _stat(file)
        if about is not None and (same := ours.get((about.st_dev, about.st_ino))) is not None:
            raise BatchError(
                f"the input reads {file}, which is the output's file {same}: name another output, outside what the "
                "input stands for"
            )


def _stat(file: str | os.PathLike[str]) -> os.stat_result | None:
    try:
        return os.stat(file)
    except OSError:
        return None


def _check_last(source: Source, output: Output) -> None:
    """Raises BatchError where the last row of the output is another item's."""
    if output.last is None:
        return
    item: Item | None = next(source.items(output.rows - 1), None)
    if item is None or item.id != output.last["id"]:
        raise BatchError(
            f"row {output.rows - 1} of {output.path} is {output.last['id']!r}, and of the input "
            f"{None if item is None else item.id!r}: the input has changed; name another output, or begin anew with "
            "--overwrite"
        )


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; the next ones do what they otherwise do."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        asked.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
