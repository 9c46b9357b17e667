"""Who answers: this process, several processes of this machine, or actors of a Ray cluster. Questions are handed out in
blocks as workers become free, and answers come back to the caller, who alone writes them.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llava_fast.errors import EvaluationError, LlavaFastError
from llava_fast.evaluate.model import RUNNING, ModelSpec, answers_of
from llava_fast.evaluate.task import Answer, Question
from llava_fast.orphans import end_with_parent
from llava_fast.storage.hub import local_directory

Options = Mapping[str, Any]
"""Fields of Sampling."""
Answered = Iterator[tuple[Question, Answer]]
Answerer = Callable[[Sequence[Question], Options], Answered]
"""Answers questions, in any order."""
BLOCK = 4 * RUNNING  # questions that a worker is given at once


def in_this_process(spec: ModelSpec, running: int = RUNNING) -> Answerer:
    """Loads the model when the first question comes; under torchrun, onto the GPU of its LOCAL_RANK."""
    loaded: list[Any] = []

    def answer(questions: Sequence[Question], options: Options) -> Answered:
        if not loaded:
            loaded.append(spec.load(_gpu(spec, int(os.environ.get("LOCAL_RANK", "0")))))
        return answers_of(loaded[0], questions, options, running)

    return answer


# ---------------------------------------------------------------- processes


def in_processes(spec: ModelSpec, count: int, running: int = RUNNING) -> Answerer:
    """`count` processes, each with a model of its own: GPU i for process i where there are several, a share of the
    cores without. Raises EvaluationError when one of them ends.
    """

    def answer(questions: Sequence[Question], options: Options) -> Answered:
        context = multiprocessing.get_context("spawn")
        blocks, answers = context.Queue(), context.Queue()
        size = max(1, min(BLOCK, -(-len(questions) // count)))
        supply = iter([(first, questions[first : first + size]) for first in range(0, len(questions), size)])
        workers = [
            context.Process(target=_work, args=(spec, number, count, running, options, blocks, answers), daemon=True)
            for number in range(count)
        ]
        for worker in workers:
            worker.start()
        for _ in range(2 * count):  # a block ahead
            blocks.put(next(supply, None))  # None ends a worker
        try:
            for done in range(1, len(questions) + 1):
                number, found = _next(answers, workers)
                if done % size == 0:
                    blocks.put(next(supply, None))
                yield questions[number], found
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()

    return answer


def _gpu(spec: ModelSpec, number: int) -> str | None:
    """The device of process `number` of this machine, where the GPUs are to be used and none is named."""
    import torch

    gpus = torch.cuda.device_count()
    return f"cuda:{number % gpus}" if spec.device in (None, "cuda") and gpus else spec.device


def _next(answers: Any, workers: list[Any]) -> tuple[int, Answer]:
    while True:
        try:
            number, found = answers.get(timeout=1.0)
        except queue.Empty:
            ended = [worker for worker in workers if worker.exitcode not in (None, 0)]
            if ended:
                raise EvaluationError(
                    f"a process of the evaluation ended with code {ended[0].exitcode}; its answers so far are kept, so "
                    "give the same command to go on"
                ) from None
            continue
        if isinstance(found, Answer):
            return number, found
        raise EvaluationError(found)


def _work(
    spec: ModelSpec,
    number: int,
    count: int,
    running: int,
    options: Options,
    blocks: Any,
    answers: Any,
) -> None:
    end_with_parent()
    try:
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // count))
        model = spec.load(_gpu(spec, number))
        while (block := blocks.get()) is not None:
            first, questions = block
            place = {question.id: at for at, question in enumerate(questions, start=first)}
            for question, answer in answers_of(model, questions, options, running):
                answers.put((place[question.id], answer))
    except LlavaFastError as error:
        answers.put((-1, str(error)))


# ---------------------------------------------------------------- Ray


def on_ray(spec: ModelSpec, count: int, running: int = RUNNING, address: str | None = None) -> Answerer:
    """`count` actors of a Ray cluster (an address, or RAY_ADDRESS, or a new one on this machine), a GPU each where the
    cluster has any. Each must see the model's path. Raises MissingPackageError without Ray.
    """

    def answer(questions: Sequence[Question], options: Options) -> Answered:
        from llava_fast.batch.cluster import check_ray, joined

        check_ray()
        with joined(address, count):
            yield from _on_actors(spec, count, running, questions, options)

    return answer


def _on_actors(spec: ModelSpec, count: int, running: int, questions: Sequence[Question], options: Options) -> Answered:
    import ray

    if (place := local_directory(spec.path)) is not None:
        spec = dataclasses.replace(spec, path=os.path.abspath(place))  # actors have another working directory
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    actors: list[Any] = [ray.remote(num_gpus=gpus)(RayWorker).remote(spec, running) for _ in range(count)]
    supply = iter([questions[first : first + BLOCK] for first in range(0, len(questions), BLOCK)])
    busy: dict[Any, tuple[Any, Sequence[Question]]] = {}

    def give(actor: Any) -> None:
        if (block := next(supply, None)) is not None:
            busy[actor.answer.remote(list(block), options)] = actor, block

    try:
        for _ in range(2):  # a block ahead
            for actor in actors:
                give(actor)
        while busy:
            (done, *_), _ = ray.wait(list(busy))
            actor, block = busy.pop(done)
            give(actor)
            by_id = {question.id: question for question in block}
            for name, result in _got(ray, done):
                yield by_id[name], result
    finally:
        for actor in actors:
            ray.kill(actor)


class RayWorker:
    """What runs in an actor."""

    def __init__(self, spec: ModelSpec, running: int) -> None:
        self.model, self.running = spec.load(), running

    def answer(self, questions: Sequence[Question], options: Options) -> list[tuple[str, Answer]]:
        return [(question.id, found) for question, found in answers_of(self.model, questions, options, self.running)]


def _got(ray: Any, done: Any) -> list[tuple[str, Answer]]:
    try:
        return ray.get(done)
    except ray.exceptions.RayError as error:
        line = str(error).strip().splitlines()[-1]
        raise EvaluationError(f"an actor of the evaluation failed ({line}); answers so far are kept") from None
