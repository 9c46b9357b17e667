"""From a request's body to running sequences: what may be asked, who may wait, and the pool that reads images."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from llava_fast.errors import RequestError
from llava_fast.generation.llava import Llava
from llava_fast.generation.prefix_cache import PrefixCache
from llava_fast.generation.prompt import Prompt, read_prompt
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import Sequence, new_sequence
from llava_fast.serve.engine import Engine, Step, error_of
from llava_fast.serve.errors import ApiError
from llava_fast.serve.protocol import ChatRequest, Options
from llava_fast.serve.requests import chat_request
from llava_fast.serve.settings import Settings


class Service:
    """A model that answers requests' bodies. Methods run in the event loop; what takes time runs in the pool or in the
    engine's thread."""

    def __init__(self, model: Llava, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.created = int(time.time())
        runner = Runner(model)
        self.engine = Engine(Scheduler(runner, PrefixCache(runner.cache), max_running=settings.max_running))
        self.pool = ThreadPoolExecutor(settings.workers, "llava-fast-prepare")
        self.open_answers = 0
        self.seconds = 1.0  # how long an answer takes, lately

    def start(self) -> None:
        self.engine.start(asyncio.get_running_loop())

    def stop(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.engine.stop()

    @contextmanager
    def admitted(self, answers: int):
        """Room for so many answers while the block runs. Raises ApiError 429 where there is none."""
        most = self.settings.max_running + self.settings.max_waiting
        if self.open_answers + answers > most:
            turns = max(1, self.open_answers // self.settings.max_running)
            wait = min(60, max(1, round(self.seconds * turns)))
            raise ApiError(
                429,
                f"the server answers or keeps waiting {self.open_answers} requests and takes {most}: try again later",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )
        self.open_answers += answers
        started = time.monotonic()
        try:
            yield
        finally:
            self.open_answers -= answers
            self.seconds += 0.1 * (time.monotonic() - started - self.seconds)

    def check(self, body: Options) -> None:
        """Raises ApiError for what this server does not serve."""
        settings = self.settings
        if body.model != settings.model_name:
            raise ApiError(
                404,
                f"the model {body.model[:200]!r} is not served here; {settings.model_name!r} is",
                param="model",
                code="model_not_found",
            )
        if (body.n or 1) > settings.max_choices:
            raise ApiError(400, f"n is {body.n} and this server makes at most {settings.max_choices} answers", "n")
        most = settings.max_answer_tokens
        if most is not None and (body.most_tokens or 0) > most:
            raise ApiError(400, f"max_tokens is {body.most_tokens} and this server's limit is {most}", "max_tokens")

    async def sequences(self, body: ChatRequest) -> list[Sequence]:
        """The body's prompt read and cut, and a sequence for each answer. Raises RequestError and ImageError."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, self._prepare, chat_request, body)

    def _prepare(self, reader: Callable[[Any], dict], body: Any) -> list[Sequence]:
        prompt = read_prompt(self.model.processor, reader(body))
        limit = self._room(prompt, body.most_tokens)
        sampling = Sampling.of(None, max_new_tokens=limit, **body.sampling())
        seeds = [None if sampling.seed is None else sampling.seed + i for i in range(body.n or 1)]
        return [new_sequence(self.model, prompt, sampling, seed, pieces=True) for seed in seeds]

    def _room(self, prompt: Prompt, asked: int | None) -> int:
        """The most tokens of the answer. Raises RequestError for a prompt that is too long."""
        context = self.model.config.decoder.context_length
        most = min(context, self.settings.max_prompt_tokens or context)
        if prompt.rows > most or prompt.rows >= context:
            raise RequestError(
                f"the prompt takes {prompt.rows} tokens ({prompt.visual_rows} of them visual) and this server takes "
                f"{min(most, context - 1)}: shorten it, or use fewer or smaller images"
            )
        room = context - prompt.rows
        return min(room, self.settings.max_answer_tokens or room) if asked is None else min(room, asked)

    async def steps(self, sequences: list[Sequence], deadline: float) -> AsyncGenerator[tuple[int, Step]]:
        """Run sequences; yields (number of the sequence, what a step did) until all have ended. They are cancelled
        when the caller closes this. Raises the error of a sequence that fails, and TimeoutError at the deadline (by
        the event loop's clock)."""
        now = asyncio.get_running_loop().time
        arrived: asyncio.Queue[tuple[int, Step]] = asyncio.Queue()
        try:
            for number, sequence in enumerate(sequences):
                self.engine.add(sequence, partial(_put, arrived, number))
            left = len(sequences)
            while left:
                number, step = await asyncio.wait_for(arrived.get(), deadline - now())
                if step.finished:
                    left -= 1
                    if (error := error_of(step.sequence)) is not None:
                        raise error
                yield number, step
        finally:
            for sequence in sequences:
                self.engine.cancel(sequence)


def _put(arrived: asyncio.Queue[tuple[int, Step]], number: int, step: Step) -> None:
    arrived.put_nowait((number, step))
