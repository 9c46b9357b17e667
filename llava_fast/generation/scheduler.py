"""Continuous batching: sequences join and leave between steps, and share one cache.

A step has at most one prefill pass, with a bounded number of rows, and one decoding pass, with one token for every
sequence whose prompt is done, so that a long prompt does not stall the others. Sources: Yu et al. 2022 (Orca: joining
between steps), Agrawal et al. 2023 (chunked prefill).

Sequences are admitted in order of arrival, as soon as the cache has blocks for all rows that a sequence must run.
Answers allocate blocks as they grow. When none are left, the sequence admitted last is preempted: its blocks are freed
and it returns to the front of the queue; its rows are recomputed later, and its answer is the same.

If the device chooses the tokens (device_sampling), a step is launched before the tokens of the previous one are read,
so that the device never waits for the host. A sequence that turns out to have ended has then run one extra row, whose
token is dropped.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_fast.errors import CacheFullError
from llava_fast.generation.device_sampling import Flight
from llava_fast.generation.prefix_cache import PrefixCache, common_rows
from llava_fast.generation.runner import Chunk, Runner, is_last
from llava_fast.generation.sampling import greedy_tokens, not_a_number
from llava_fast.generation.sequence import Sequence
from llava_fast.models.paged_cache import BlockTable

logger = logging.getLogger("llava_fast.generation")
Moved = list[tuple[Sequence, str]]
GROWTH_ROWS = 256  # if memory must be allocated for a prompt, allocate for this many rows of its answer too


@dataclass(frozen=True)
class Stats:
    """A scheduler's state. used_blocks: blocks of running sequences; kept_blocks: blocks kept for later prompts.
    reused_rows (found in the cache at first admissions), preemptions: totals since its creation.
    """

    waiting: int
    prefilling: int
    decoding: int
    used_blocks: int
    kept_blocks: int
    max_blocks: int
    reused_rows: int
    preemptions: int


class Scheduler:
    """Not thread-safe: call it from one thread.

    chunk_rows   most prompt rows in one prefill pass (an image is encoded whole; under dynamic RoPE a prompt beyond
                 the decoder's own length runs whole).
    max_running  most sequences admitted at once.
    prefixes     keeps finished rows for prompts with the same prefix; None: each prompt runs whole.
    """

    def __init__(
        self, runner: Runner, prefixes: PrefixCache | None = None, chunk_rows: int = 4096, max_running: int = 256
    ) -> None:
        if chunk_rows < 1 or max_running < 1:
            raise ValueError(f"chunk_rows and max_running must be 1 or more, got {chunk_rows} and {max_running}")
        self.runner, self.cache, self.prefixes = runner, runner.cache, prefixes
        self.chunk_rows, self.max_running = chunk_rows, max_running
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []  # both in the order of admission
        self.decoding: list[Sequence] = []
        self._flight: Flight | None = None  # the launched step whose tokens have not been read
        self._refused: tuple[Sequence, int] | None = None  # the sequence that did not fit, blocks in use at that time
        self._admissions = self._reused_rows = self._preemptions = 0

    @property
    def stats(self) -> Stats:
        cache = self.cache
        return Stats(
            len(self.waiting),
            len(self.prefilling),
            len(self.decoding),
            cache.used_blocks,
            cache.blocks - cache.free_blocks - cache.used_blocks,
            cache.max_blocks,
            self._reused_rows,
            self._preemptions,
        )

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.decoding)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue. Raises CacheFullError if the cache could never hold its prompt; an
        answer that outgrows it ends with "length".
        """
        most = self.cache.max_blocks * self.cache.block_rows
        if sequence.prompt.rows >= most:
            raise CacheFullError(
                f"the prompt takes {sequence.prompt.rows} rows and the KV cache holds {most}: shorten it, use fewer or "
                "smaller images, or give the cache more memory"
            )
        sequence.limit = min(sequence.limit, most - sequence.prompt.rows)
        if sequence.finish_reason is None:
            self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Remove a sequence, waiting or running, and free its blocks; no effect if it has ended."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "cancelled"
            self._leave(sequence)

    def step(self) -> Moved:
        """Run one step; returns the sequences that advanced, each with its new final text (none, where a first step was
        launched). If a sequence's pass or sampler fails, only that sequence ends, with "error". Call it until
        `is_idle`.
        """
        if not torch.is_inference_mode_enabled():
            with torch.inference_mode():
                return self.step()
        moved = self._admit() if self.waiting else []
        decoding = list(self.decoding)  # sequences prefilled in this step already get a token
        moved += self._prefill() if self.prefilling else []
        decoding = [sequence for sequence in decoding if sequence.finish_reason is None]
        if decoding:
            moved += self._decode(decoding)
        return moved

    # ------------------------------------------------------------ joining and leaving

    def _admit(self) -> Moved:
        """Returns the sequences that failed. If routing encodes images, whose rows are then held, only one sequence is
        admitted while others decode, and none beyond one prefill pass.
        """
        moved: Moved = []
        encoded = False
        rows_to_run = sum(sequence.rows - sequence.cached.length for sequence in self.prefilling)
        for sequence in list(self.waiting):
            running = len(self.prefilling) + len(self.decoding)
            if running >= self.max_running or self._refused == (sequence, self.cache.used_blocks):
                break
            if encoded and (self.decoding or rows_to_run >= self.chunk_rows):
                break
            try:
                encoded |= self.runner.route(sequence)
            except torch.AcceleratorError as error:
                return moved + self._all_failed(error)
            except Exception as error:
                moved.append(self._fail(sequence, error))
                continue
            blocks, rows = self._cached(sequence)
            if self._is_being_cached(sequence, rows):
                continue
            needed = self.cache.blocks_for(sequence.rows + 1) - rows // self.cache.block_rows
            free = self.cache.available_blocks - sum(not self.cache.users[block] for block in blocks)
            if running and free < needed + running:  # each running sequence may soon need another block
                self._refused = sequence, self.cache.used_blocks
                break
            expected = self.cache.blocks_for(sequence.rows + min(sequence.limit, GROWTH_ROWS))
            table = BlockTable(self.cache)
            try:
                table.share(blocks, rows)
                table.reserve(sequence.rows, expected)
            except CacheFullError:  # shared blocks cannot be reclaimed for it
                table.release()
                if running:
                    break
                rows = 0
                table.reserve(sequence.rows, expected)
            sequence.table, sequence.cached_rows, sequence.admission = table, rows, self._admissions
            self._admissions += 1
            if sequence.reused_rows is None:  # after a preemption they are its own
                sequence.reused_rows = rows
                self._reused_rows += rows
            self.waiting.remove(sequence)
            self.prefilling.append(sequence)
            rows_to_run += sequence.rows - rows
        return moved

    def _cached(self, sequence: Sequence) -> tuple[list[int], int]:
        """Blocks that hold the sequence's first rows, and how many rows; the last row always runs, for its logits."""
        if self.prefixes is None or not self.runner.may_reuse(sequence):
            return [], 0
        return self.prefixes.find(sequence.keys[: sequence.rows - 1])

    def _is_being_cached(self, sequence: Sequence, rows: int) -> bool:
        """Whether another sequence has yet to run rows that are a common prefix of at least half of this one's rows:
        then this one waits for them.
        """
        if self.prefixes is None or not self.runner.may_reuse(sequence):
            return False
        keys, half = sequence.keys[: sequence.rows - 1], sequence.rows // 2
        return any(
            self.runner.may_reuse(other) and other.keys[:half] == keys[:half] and common_rows(other.keys, keys) > rows
            for other in self.prefilling
        )

    def _leave(self, sequence: Sequence) -> None:
        """Remove a sequence from its list, and free its blocks."""
        for members in (self.decoding, self.prefilling, self.waiting):
            if sequence in members:
                members.remove(sequence)
        if sequence.table is not None:
            sequence.table.release()
        sequence.table = sequence.embedded = None
        self.runner.release([sequence])
        if not self.decoding:
            self._flight = None  # its tokens are not needed

    def _fail(self, sequence: Sequence, error: Exception) -> tuple[Sequence, str]:
        sequence.finish_reason, sequence.error = "error", error
        if self.prefixes is not None and sequence.table is not None:
            self.prefixes.forget(sequence.table.blocks[sequence.cached_rows // self.cache.block_rows :])
        self._leave(sequence)
        return sequence, ""

    def _preempt(self, sequence: Sequence) -> None:
        self._keep(sequence, running=False)
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        self._preemptions += 1

    def _keep(self, sequence: Sequence, running: bool) -> None:
        """Make the rows that the sequence has run available to other prompts."""
        if self.prefixes is not None and self.runner.may_reuse(sequence):
            self.prefixes.insert(sequence.keys, sequence.cached.blocks, sequence.cached.length, running)

    # ------------------------------------------------------------ running

    def _prefill(self) -> Moved:
        chunks: list[Chunk] = []
        left = self.chunk_rows
        for sequence in self.prefilling:
            if left <= 0 or (chunks and self.runner.batch_invariant):
                break
            chunks.append((sequence, self.runner.chunk_rows(sequence, left)))
            left -= chunks[-1][1]
        return self._run(self._prefill_pass, chunks, [sequence for sequence, _ in chunks])

    def _decode(self, sequences: list[Sequence]) -> Moved:
        """The next token of each sequence; where the device chooses, the next step is launched and the last one's
        tokens are read. No sequence runs beyond its limit."""
        going = [each for each in sequences if len(each.token_ids) + each.ahead < each.limit]
        short = sum(each.cached.length == each.cached.capacity for each in going)
        if self._flight is not None and short > self.cache.available_blocks:  # preemption needs all tokens
            return self._land(None)
        if short:
            going = self._grown(going)
        flight = self._launched(going) if going else None
        if self._flight is not None or flight is not None:
            return self._land(flight)
        return self._run(self._decode_pass, going, going) if going else []

    def _launched(self, sequences: list[Sequence]) -> Flight | None:
        try:
            flight = self.runner.launch(sequences)
        except Exception as error:  # running on the host shows whether a sequence is the cause
            logger.warning("launching a step of %d sequences failed, so the host runs it: %r", len(sequences), error)
            return None
        if flight is not None:
            self.runner.advance([(sequence, 1) for sequence in sequences])
            for sequence in sequences:
                sequence.ahead += 1
        return flight

    def _land(self, launched: Flight | None) -> Moved:
        """Read the tokens of the last step that was launched; `launched` is now the last one."""
        flight, self._flight = self._flight, launched
        if flight is None:
            return []
        try:
            tokens = flight.tokens()
        except Exception as error:
            return self._all_failed(error)
        running: list[Sequence] = []
        chosen: list[int | Exception] = []
        for sequence, token in zip(flight.sequences, tokens, strict=True):
            sequence.ahead -= 1
            if sequence.finish_reason is None:
                running.append(sequence)
                chosen.append(token if token >= 0 else not_a_number(len(sequence.token_ids)))
                sequence.sampler.drawn.append(token)
        return self._push(running, chosen)

    def _grown(self, sequences: list[Sequence]) -> list[Sequence]:
        """Allocate a block for each sequence that needs one; returns the sequences that still run."""
        while True:
            short = [s for s in sequences if s.cached.length == s.cached.capacity]
            if len(short) <= self.cache.available_blocks:
                for sequence in short:
                    sequence.cached.reserve(sequence.cached.length + 1)
                return sequences
            youngest = max(self.prefilling + self.decoding, key=lambda sequence: sequence.admission)
            self._preempt(youngest)
            sequences = [sequence for sequence in sequences if sequence is not youngest]

    def _run(self, one_pass: Callable[[list], Moved], items: list, sequences: list[Sequence]) -> Moved:
        """Run one pass over all items; if it fails, one pass per item, so that only the faulty sequence gets the error.
        After a device error no pass can succeed, so every sequence fails."""
        failure = None
        try:
            return one_pass(items)
        except Exception as error:
            failure = error
        failure.__traceback__ = None  # its frames keep the pass's tensors alive
        if isinstance(failure, torch.AcceleratorError):
            return self._all_failed(failure)
        if len(items) == 1:
            return [self._fail(sequences[0], failure)]
        logger.warning("a pass of %d sequences failed, so each runs alone: %r", len(items), failure)
        moved: Moved = []
        for item, sequence in zip(items, sequences, strict=True):
            if sequence.finish_reason is None:
                moved += self._run(one_pass, [item], [sequence])
        return moved

    def _all_failed(self, failure: Exception) -> Moved:
        logger.error("the device failed, and with it every sequence: %r", failure)
        self._flight = None
        return [self._fail(each, failure) for each in (*self.decoding, *self.prefilling, *self.waiting)]

    def _prefill_pass(self, chunks: list[Chunk]) -> Moved:
        logits = self.runner.prefill(chunks)
        ready = [sequence for sequence, rows in chunks if is_last(sequence, rows)]
        tokens = choose(logits, ready) if logits is not None else []
        self.runner.advance(chunks)  # last: a failed pass must change no sequence
        for sequence, _ in chunks:
            self._keep(sequence, running=True)
        for sequence in ready:
            self.prefilling.remove(sequence)
            self.decoding.append(sequence)
        return self._push(ready, tokens)

    def _decode_pass(self, sequences: list[Sequence]) -> Moved:
        tokens = choose(self.runner.step(sequences), sequences)
        self.runner.advance([(sequence, 1) for sequence in sequences])
        return self._push(sequences, tokens)

    def _push(self, sequences: list[Sequence], tokens: list[int | Exception]) -> Moved:
        moved: Moved = []
        for sequence, token in zip(sequences, tokens, strict=True):
            if isinstance(token, Exception):
                moved.append(self._fail(sequence, token))
                continue
            try:
                moved.append((sequence, sequence.push(token)))
            except Exception as error:
                moved.append(self._fail(sequence, error))
                continue
            if sequence.finish_reason is not None:
                self._keep(sequence, running=False)
                self._leave(sequence)
        return moved


def choose(logits: Tensor, sequences: list[Sequence]) -> list[int | Exception]:
    """The next token of each sequence, or its error; one transfer from the device for all greedy sequences and one for
    all others.
    """
    greedy = [sequence.sampler.is_greedy for sequence in sequences]
    tokens = greedy_tokens(logits) if any(greedy) else [-1] * len(sequences)
    if not all(greedy):
        logits = logits.cpu()
    chosen: list[int | Exception] = []
    for number, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
        if not greedy[number]:
            chosen.append(_drawn(sequence, logits[number]))
        else:
            chosen.append(token if token >= 0 else not_a_number(len(sequence.token_ids)))
    return chosen


def _drawn(sequence: Sequence, logits: Tensor) -> int | Exception:
    try:
        return sequence.sampler(logits)
    except Exception as error:
        return error
