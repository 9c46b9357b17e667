"""A model that answers items as sequences that join and leave the scheduler."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from llava_fast.batch.items import Item, check_pyav
from llava_fast.batch.output import GO_ON
from llava_fast.batch.prompts import PromptTemplate
from llava_fast.errors import BatchError, LlavaFastError, MissingPackageError, PromptTooLongError
from llava_fast.generation.feature_cache import FeatureCache
from llava_fast.generation.llava import Llava
from llava_fast.generation.prefix_cache import PrefixCache
from llava_fast.generation.prompt import Prompt, prompt_of
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Moved, Scheduler
from llava_fast.generation.sequence import Sequence, new_sequence
from llava_fast.inputs.pictures.reading import OPEN_FORMATS
from llava_fast.storage.files import one_line

KEPT_BYTES = 256 << 20  # of keys and values, and of image features, for pictures that come again
PATIENCE = 0.2  # seconds between two looks at what the caller wants, while pictures are read

Row = dict[str, Any]
Prepared = tuple[Item, Sequence | Exception]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How items are answered.

    prompt           see PromptTemplate (None: a column, which job.run chooses). `system`: a system message before it.
    sampling         how to generate; item i draws from its seed + i.
    literal_text     control tokens and placeholders in prompts are text (see inputs.literal). Otherwise a prompt places
                     its pictures by <image> and <video>; those that it does not place come first.
    video_frames     how many frames of a video are used (None: 16, or the model's own number or rate).
    max_running      most answers made at once.
    workers          threads that read pictures and tokenise.
    batch_invariant  answers do not depend on what runs beside them, to the bit (see Runner).
    repeats          pictures may come again: their features, and rows of equal prompts, are kept.
    """

    prompt: str | None = None
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    literal_text: bool = True
    video_frames: int | None = None
    max_running: int = 32
    workers: int = 2
    batch_invariant: bool = False
    repeats: bool = False


class Answerer:
    """Not thread-safe. Raises RequestError for a grammar that cannot be used."""

    def __init__(self, model: Llava, settings: Settings) -> None:
        self.model, self.settings = model, settings
        assert settings.prompt is not None  # chosen by job.run
        self.template = PromptTemplate(settings.prompt)
        self.processor = replace(
            model.own_processor.with_frames(settings.video_frames),
            literal_text=settings.literal_text,
            formats=OPEN_FORMATS,
            threads=1,  # pictures are read side by side
        )
        if settings.literal_text:
            _ = self.processor.literal  # made now: every thread would make its own
        reuse = settings.repeats and not settings.batch_invariant
        cache = model.decoder.new_cache(keep_bytes=KEPT_BYTES if reuse else 0)
        features = FeatureCache(KEPT_BYTES) if reuse else None
        runner = Runner(model, cache, features, batch_invariant=settings.batch_invariant)
        prefixes = PrefixCache(cache) if reuse else None
        self.scheduler = Scheduler(runner, prefixes, max_running=settings.max_running)
        self.ahead = settings.max_running + 2 * settings.workers
        new_sequence(model, Prompt(()), settings.sampling)  # a grammar that cannot be used: now, not in every row

    def steps(self, items: Iterable[Item]) -> Iterator[list[tuple[int, Row]]]:
        """Answer all items; yields after each step, and at least every PATIENCE seconds, the (number, row) of those
        that ended, in the order in which they did. An item that fails is a row with an "error". When the caller closes
        this, what runs is dropped. Raises what `items` raises, MissingPackageError, and BatchError when the device
        or the whole step fails."""
        shared = _Shared(items)
        pending: set[Future[Prepared | None]] = set()
        running: dict[Sequence, Item] = {}
        pool = ThreadPoolExecutor(self.settings.workers, "llava-fast-prepare")
        try:
            while True:
                while not shared.ended and len(pending) + len(running) < self.ahead:
                    pending.add(pool.submit(self._next, shared))
                if self.scheduler.is_idle:
                    wait(pending, PATIENCE, FIRST_COMPLETED)
                rows = self._admit(pending, running)
                if not self.scheduler.is_idle:
                    for sequence, _ in self._step():
                        if sequence.finish_reason is not None:
                            rows.append(self._row(running.pop(sequence), sequence))
                yield rows
                if shared.ended and not pending and not running:
                    return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for sequence in running:
                self.scheduler.cancel(sequence)

    def _step(self) -> Moved:
        try:
            return self.scheduler.step()
        except LlavaFastError:
            raise
        except Exception as error:  # not of one answer: the scheduler ends such answers by themselves
            raise BatchError(f"the model failed ({type(error).__name__}: {one_line(error)}): {GO_ON}") from error

    def _next(self, shared: _Shared) -> Prepared | None:
        """The next item with its sequence or what is wrong with it; in a thread of the pool."""
        if (item := shared.next()) is None:
            return None
        try:
            return item, self._prepare(item)
        except MissingPackageError:
            raise
        except Exception as error:  # of one picture among many: the others are answered
            return item, error

    def _prepare(self, item: Item) -> Sequence:
        if item.error is not None:
            raise BatchError(item.error)
        if item.video is not None:
            check_pyav()  # which rows of shards have videos is known only now, and on Ray's nodes
        sampling = self.settings.sampling
        prompt = prompt_of(self.processor, self.request(item))
        limit = self.model.config.decoder.context_length
        if prompt.rows >= limit and sampling.max_new_tokens:
            raise PromptTooLongError(
                f"the prompt takes {prompt.rows} tokens ({prompt.visual_rows} of them visual) and the model's context "
                f"is {limit}: shorten it, or use fewer or smaller pictures"
            )
        if self.scheduler.prefixes is not None:
            _ = prompt.keys  # hashed in this thread
        return new_sequence(self.model, prompt, sampling, self.seed(item))

    def seed(self, item: Item) -> int | None:
        """An item's own, from that of the sampling."""
        seed = self.settings.sampling.seed
        return None if seed is None else (seed + item.number) % 2**63

    def request(self, item: Item) -> dict[str, Any]:
        """An item as a request of llava_fast. Raises RequestError for a prompt that lacks a value."""
        text = self.template.fill(item.columns)
        media = [("image", len(item.images)), ("video", int(item.video is not None))]
        content: Any
        if self.settings.literal_text:
            content = [{"type": kind} for kind, count in media for _ in range(count)] + [{"type": "text", "text": text}]
        else:
            content = "".join(f"<{kind}>\n" * count for kind, count in media if f"<{kind}>" not in text) + text
        messages = [{"role": "user", "content": content}]
        if self.settings.system is not None:
            messages.insert(0, {"role": "system", "content": self.settings.system})
        request: dict[str, Any] = {"messages": messages, "images": list(item.images)}
        if item.video is not None:
            request["video"] = item.video
        return request

    def _admit(self, pending: set[Future[Prepared | None]], running: dict[Sequence, Item]) -> list[tuple[int, Row]]:
        """Let those that are prepared join; rows of those that cannot."""
        rows = []
        for future in [each for each in pending if each.done()]:
            pending.remove(future)
            if (prepared := future.result()) is None:
                continue
            item, sequence = prepared
            if not isinstance(sequence, Exception):
                try:
                    self.scheduler.add(sequence)
                except Exception as error:
                    sequence = error
            if isinstance(sequence, Exception):
                rows.append((item.number, error_row(item, sequence)))
            elif sequence.finish_reason is not None:  # it may not have a single token
                rows.append(self._row(item, sequence))
            else:
                running[sequence] = item
        return rows

    def _row(self, item: Item, sequence: Sequence) -> tuple[int, Row]:
        if isinstance(sequence.error, torch.AcceleratorError):
            raise BatchError(f"the device failed ({one_line(sequence.error)}): {GO_ON}") from sequence.error
        try:
            answer = sequence.result()
            text: Any = answer.text
            if self.settings.sampling.grammar is not None:
                text = self._value(answer.text, answer.finish_reason)
        except Exception as error:
            return item.number, error_row(item, error)
        row = {"id": item.id, "answer": text, "finish_reason": answer.finish_reason, "usage": vars(answer.usage)}
        return item.number, row

    def _value(self, text: str, finish_reason: str) -> Any:
        """The JSON value of an answer that follows a schema. Raises BatchError for one that was cut off."""
        try:
            return json.loads(text, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            why = f"was cut off at {self.settings.sampling.max_new_tokens} tokens: raise --max-tokens"
            if finish_reason == "stop":
                why = str(error)
            raise BatchError(f"the answer is no whole JSON value ({why}): {text[:200]!r}") from None


def error_row(item: Item, error: Exception) -> Row:
    kind = "" if isinstance(error, ValueError) or not str(error) else f"{type(error).__name__}: "
    return {"id": item.id, "error": f"{kind}{error}" or type(error).__name__}


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


class _Shared:
    """An iterator that several threads read from."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items, self._lock, self.ended = iter(items), threading.Lock(), False

    def next(self) -> Item | None:
        with self._lock:
            found = None if self.ended else next(self._items, None)
            self.ended = found is None
            return found
