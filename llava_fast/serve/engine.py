"""The thread that owns the scheduler: requests come in by a queue, tokens go back to the event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llava_fast.errors import GenerationError
from llava_fast.generation.scheduler import Scheduler, Stats
from llava_fast.generation.sequence import Sequence

logger = logging.getLogger("llava_fast.serve")


@dataclass(frozen=True)
class Step:
    """What one step did to a sequence: the text that became certain, and how many tokens the answer has now.
    `finished`: this was the last one; the sequence says how it ended. Nothing else of a running sequence may be read
    outside the engine's thread."""

    sequence: Sequence
    text: str
    tokens: int
    finished: bool


Listener = Callable[[Step], None]


class Engine:
    """Runs sequences until they end. All methods may be called from the event loop that `start` was given; listeners
    are called there too.

    A sequence that is cancelled leaves before the next step. If a step fails as a whole, every sequence in it ends
    with that error and the engine goes on. After an error of the device nothing can run in this process: `can_answer`
    is then False.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.stats: Stats = scheduler.stats  # as of the last step
        self._commands: queue.SimpleQueue[tuple[str, Sequence | None]] = queue.SimpleQueue()
        self._listeners: dict[Sequence, Listener] = {}  # of the event loop's thread
        self._members: set[Sequence] = set()  # of the engine's thread
        self._thread = threading.Thread(target=self._run, name="llava-fast-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._device_failed = False

    @property
    def can_answer(self) -> bool:
        return self._thread.is_alive() and not self._device_failed

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def add(self, sequence: Sequence, listener: Listener) -> None:
        """Run a sequence; `listener` is told of each of its steps."""
        self._listeners[sequence] = listener
        self._commands.put(("add", sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Take a sequence out before the next step. Its listener is not called again."""
        if self._listeners.pop(sequence, None) is not None:
            self._commands.put(("cancel", sequence))

    def stop(self) -> None:
        """End the thread after the step that it is in. Sequences that run are dropped."""
        self._commands.put(("stop", None))
        self._thread.join()

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        while self._obey():
            try:
                moved = self.scheduler.step()
            except Exception as error:  # beyond what the scheduler keeps with one sequence
                logger.exception("a step failed")
                moved = []
                for sequence in list(self._members):
                    self.scheduler.cancel(sequence)
                    self._failed(sequence, error)
                    moved.append((sequence, ""))
            self._device_failed |= any(isinstance(s.error, torch.AcceleratorError) for s, _ in moved)
            self._tell([Step(s, text, len(s.token_ids), s.finish_reason is not None) for s, text in moved])

    def _obey(self) -> bool:
        """Carry out the commands that have come; waits for one while there is nothing to run. False: stop."""
        refused: list[Step] = []
        while self.scheduler.is_idle or not self._commands.empty():
            if refused and self._commands.empty():
                self._tell(refused)
                refused = []
            command, sequence = self._commands.get()
            if sequence is None:
                return False
            if command == "cancel":
                self.scheduler.cancel(sequence)
                self._members.discard(sequence)
                continue
            try:
                self.scheduler.add(sequence)
                self._members.add(sequence)
            except Exception as error:
                self._failed(sequence, error)
            if sequence.finish_reason is not None:  # refused, or it may not have a single token
                refused.append(Step(sequence, "", 0, True))
        self._tell(refused)
        return True

    def _failed(self, sequence: Sequence, error: Exception) -> None:
        sequence.finish_reason, sequence.error = "error", error

    def _tell(self, steps: list[Step]) -> None:
        self._members.difference_update(step.sequence for step in steps if step.finished)
        self.stats = self.scheduler.stats
        if steps and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, steps)

    # ------------------------------------------------------------ the event loop's thread

    def _deliver(self, steps: list[Step]) -> None:
        for step in steps:
            listener = self._listeners.get(step.sequence)
            if listener is None:  # cancelled since
                continue
            if step.finished:
                del self._listeners[step.sequence]
            listener(step)


def error_of(sequence: Sequence) -> Exception | None:
    """The error that a finished sequence ended with."""
    if sequence.error is None and sequence.finish_reason == "error":
        return GenerationError("the answer ended in an error")
    return sequence.error
