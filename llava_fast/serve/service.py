"""Turns request bodies into running sequences: validation, admission control, and the thread pool for images."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from llava_fast.errors import PromptTooLongError, ServeError
from llava_fast.generation.feature_cache import FeatureCache
from llava_fast.generation.grammar import llguidance_tokenizer
from llava_fast.generation.llava import Llava
from llava_fast.generation.prefix_cache import PrefixCache
from llava_fast.generation.prompt import Prompt, prompt_of
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import Sequence, new_sequence
from llava_fast.inputs.literal import texts_of
from llava_fast.inputs.pictures.reading import OPEN_FORMATS
from llava_fast.serve.engine import Engine, Step, error_of
from llava_fast.serve.errors import ApiError, check_wanted
from llava_fast.serve.media import Media
from llava_fast.serve.metrics import Metrics
from llava_fast.serve.plan import prompt_plan
from llava_fast.serve.protocol import ChatRequest, CompletionRequest, PlanRequest
from llava_fast.serve.requests import chat_request, requests_of
from llava_fast.serve.settings import Settings

Body = ChatRequest | CompletionRequest

CHARACTERS_A_TOKEN = 32  # longer text, relative to the token limit, is rejected before tokenisation


class Service:
    """Answers request bodies with a model. The methods run in the event loop. Slow work runs in the pool or in the
    engine's thread."""

    def __init__(self, model: Llava, settings: Settings) -> None:
        if model.processor is None:
            raise ServeError("the model has no processor: load it with llava_fast.load")
        processor = model.processor.with_frames(settings.video_frames)
        settings = replace(settings, video_frames=processor.frames)
        self.model, self.settings = model, settings
        self.created = int(time.time())
        self.processor = replace(
            processor,
            literal_text=settings.literal_text,
            formats=OPEN_FORMATS,
        )
        if settings.literal_text:
            _ = self.processor.literal  # built now, so that the first request does not wait for it
        cache = model.decoder.new_cache(keep_bytes=settings.prefix_bytes)
        if settings.batch_invariant:
            runner = Runner(model, cache, batch_invariant=True)
            scheduler = Scheduler(runner, max_running=settings.max_running)
        else:
            runner = Runner(model, cache, FeatureCache(settings.feature_bytes))
            scheduler = Scheduler(runner, PrefixCache(cache), settings.chunk_rows, settings.max_running)
        self.engine = Engine(scheduler)
        self.pool = ThreadPoolExecutor(settings.workers, "llava-fast-prepare")
        self.metrics = Metrics(scheduler, lambda: self.open_answers)
        self.open_answers = 0
        self.seconds = 1.0  # moving average of the seconds per answer

    def start(self) -> None:
        self.engine.start(asyncio.get_running_loop())

    def stop(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)  # does not wait for running jobs
        self.engine.stop()

    @contextmanager
    def admitted(self, answers: int, timed: bool = True) -> Iterator[None]:
        """Reserve places for `answers` answers while the block runs; if `timed`, its duration counts in the mean time
        of an answer. Raises ApiError 429 if the queue is full and 503 if the engine has failed."""
        if not self.engine.can_answer:
            raise ApiError(503, "the model has failed: the server must be restarted", code="engine_failed")
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
            if timed:
                self.seconds += 0.1 * (time.monotonic() - started - self.seconds)

    def check_model(self, name: str) -> None:
        """Raise ApiError if `name` is not the served model."""
        served = self.settings.model_name
        if name != served:
            message = f"the model {name[:200]!r} is not served here; {served!r} is"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check(self, body: Body) -> None:
        """Raise ApiError if the body asks for something that this server does not support."""
        settings = self.settings
        self.check_model(body.model)
        if body.answers > settings.max_choices:
            raise ApiError(
                400, f"the request asks for {body.answers} answers and this server makes {settings.max_choices}", "n"
            )
        most = settings.max_answer_tokens
        if most is not None and (body.most_tokens or 0) > most:
            raise ApiError(400, f"max_tokens is {body.most_tokens} and this server's limit is {most}", "max_tokens")

    async def sequences(self, body: Body, gone: threading.Event) -> list[Sequence]:
        """Preprocess the body's prompts and return one sequence for each answer. When `gone` is set, the work ends
        before its next part (an image, a frame, a piece of what is fetched). Raises ApiError, RequestError and
        ImageError."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, self._prepare, body, gone)

    def _prepare(self, body: Body, gone: threading.Event) -> list[Sequence]:
        chosen = body.sampling()
        if body.top_tokens is not None:
            self.token_bytes(0)  # the first call is slow, and later calls run in the event loop
        sequences: list[Sequence] = []
        for request in requests_of(body, Media(self.settings, gone, self.processor.chosen_frames)):
            self._check_text(request)
            prompt = prompt_of(self.processor, request, partial(check_wanted, gone))
            sampling = Sampling.of(None, max_new_tokens=self._room(prompt, body.most_tokens), **chosen)
            for _ in range(body.n or 1):
                seed = None if sampling.seed is None else sampling.seed + len(sequences)
                sequences.append(new_sequence(self.model, prompt, sampling, seed, pieces=True))
        return sequences

    async def plan(self, body: PlanRequest, gone: threading.Event) -> str:
        """Return the plan of the body's images and videos as JSON. Raises the same errors as `sequences`, but
        the length of the prompt is not checked."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, self._plan, body, gone)

    def _plan(self, body: PlanRequest, gone: threading.Event) -> str:
        request = chat_request(body, Media(self.settings, gone, self.processor.chosen_frames))
        self._check_text(request)
        return prompt_plan(self.processor, request, body.model, self._most_rows).model_dump_json()

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token: the name of a special token, and no bytes for an id outside the vocabulary."""
        config = self.model.config
        if self.model.tokenizer.convert_ids_to_tokens(token) is None:  # an embedding row beyond the vocabulary
            return b""
        ends = config.eos_token_ids or (0,)  # llguidance requires one; its value does not matter here
        return llguidance_tokenizer(self.model.tokenizer, config.decoder.vocab_size, ends).decode_bytes([token])

    @property
    def limits(self) -> dict[str, int]:
        """Return the limits that a client should know before it sends a request."""
        settings = self.settings
        names = ("max_body_bytes", "max_images", "max_pixels", "max_frames", "video_frames")
        return {"max_prompt_tokens": self._most_rows} | {name: getattr(settings, name) for name in names}

    @property
    def _most_rows(self) -> int:
        """The maximum prompt length in tokens, including visual tokens."""
        context = self.model.config.decoder.context_length
        return min(context - 1, self.settings.max_prompt_tokens or context)

    def _check_text(self, request: dict[str, Any]) -> None:
        """Raise PromptTooLongError if the text is far too long. This is checked before tokenisation."""
        characters = sum(map(len, texts_of(request)))
        if characters > CHARACTERS_A_TOKEN * self._most_rows:
            raise PromptTooLongError(
                f"the prompt has {characters} characters and this server takes {self._most_rows} tokens: shorten it"
            )

    def _room(self, prompt: Prompt, asked: int | None) -> int:
        """Return the maximum number of generated tokens. Raises PromptTooLongError for too long a prompt."""
        context = self.model.config.decoder.context_length
        if prompt.rows > self._most_rows:
            raise PromptTooLongError(
                f"the prompt takes {prompt.rows} tokens ({prompt.visual_rows} of them visual) and this server takes "
                f"{self._most_rows}: shorten it, or use fewer or smaller images"
            )
        room = context - prompt.rows
        return min(room, self.settings.max_answer_tokens or room) if asked is None else min(room, asked)

    async def steps(self, sequences: list[Sequence], deadline: float) -> AsyncGenerator[tuple[int, Step]]:
        """Run sequences and yield (index of the sequence, step) until all have finished. Closing the generator cancels
        them. Raises the error of a failed sequence, and TimeoutError at `deadline` (a time of the event loop's
        clock)."""
        now = asyncio.get_running_loop().time
        arrived: asyncio.Queue[tuple[int, Step]] = asyncio.Queue()
        clocks = [self.metrics.answer(sequence) for sequence in sequences]
        try:
            for number, sequence in enumerate(sequences):
                self.engine.add(sequence, partial(_put, arrived, number))
            left = len(sequences)
            while left:
                number, step = await asyncio.wait_for(arrived.get(), deadline - now())
                clocks[number].step(step.tokens)
                if step.finished:
                    left -= 1
                    if (error := error_of(step.sequence)) is not None:
                        raise error
                yield number, step
        finally:
            for sequence, clock in zip(sequences, clocks, strict=True):
                self.engine.cancel(sequence)
                clock.end()


def _put(arrived: asyncio.Queue[tuple[int, Step]], number: int, step: Step) -> None:
    arrived.put_nowait((number, step))
