"""The thread that runs the scheduler. It takes requests from a queue and sends tokens to the event loop."""

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
    """The result of one step for a sequence: its new text, and the number of tokens generated so far. After the last
    step (`finished`), the sequence's `finish_reason` may be read. While a sequence runs, only the engine's thread may
    read its attributes."""

    sequence: Sequence
    text: str
    tokens: int
    finished: bool


Listener = Callable[[Step], None]


class Engine:
    """Runs sequences until they finish. All methods may be called in the event loop that was passed to `start`.
    Listeners are called in the same loop.

    A cancelled sequence is removed before the next step. If a whole step fails, every sequence in it ends with the
    error and the engine continues. After a device error the process cannot run the model any more, and `can_answer` is
    False.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.stats: Stats = scheduler.stats  # as of the last step
        self._commands: queue.SimpleQueue[tuple[str, Sequence | None]] = queue.SimpleQueue()
        self._listeners: dict[Sequence, Listener] = {}  # used in the event loop's thread only
        self._members: set[Sequence] = set()  # used in the engine's thread only
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
        """Start a sequence. `listener` is called after each of its steps."""
        self._listeners[sequence] = listener
        self._commands.put(("add", sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Remove a sequence before the next step. Its listener is not called again."""
        if self._listeners.pop(sequence, None) is not None:
            self._commands.put(("cancel", sequence))

    def stop(self) -> None:
        """End the thread after its current step. Running sequences are dropped."""
        self._commands.put(("stop", None))
        self._thread.join()

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        while self._obey():
            try:
                moved = self.scheduler.step()
            except Exception as error:  # an error that the scheduler could not assign to one sequence
                logger.exception("a step failed")
                moved = []
                for sequence in list(self._members):
                    self.scheduler.cancel(sequence)
                    self._failed(sequence, error)
                    moved.append((sequence, ""))
            self._device_failed |= any(isinstance(s.error, torch.AcceleratorError) for s, _ in moved)
            self._tell([Step(s, text, len(s.token_ids), s.finish_reason is not None) for s, text in moved])

    def _obey(self) -> bool:
        """Execute the queued commands. Waits for one if no sequence runs. Returns False if the thread should stop."""
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
            if sequence.finish_reason is not None:  # rejected, or its limit is zero tokens
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
            if listener is None:  # cancelled in the meantime
                continue
            if step.finished:
                del self._listeners[step.sequence]
            listener(step)


def error_of(sequence: Sequence) -> Exception | None:
    """Return the error of a finished sequence, or None."""
    if sequence.error is None and sequence.finish_reason == "error":
        return GenerationError("the answer ended in an error")
    return sequence.error
