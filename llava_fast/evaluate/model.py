"""The model of an evaluation: loading, identification, and answering with continuous batching."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_fast.errors import LlavaFastError, PromptTooLongError
from llava_fast.evaluate.task import Answer, Question

if TYPE_CHECKING:
    from llava_fast.generation.llava import Llava
    from llava_fast.generation.sequence import Sequence

RUNNING = 32  # maximum number of running sequences
READERS = 2  # threads that preprocess images ahead
KEPT_BYTES = 256 << 20  # limits of the prefix cache and of the feature cache
_ENDS = 1 << 16


@dataclass(frozen=True)
class ModelSpec:
    """The arguments of `llava_fast.load`. It can be pickled."""

    path: str
    device: str | None = None
    dtype: str | None = None
    chat_template: str | None = None
    model_base: str | None = None
    quantize: str | None = None

    def load(self, device: str | None = None) -> Llava:
        from llava_fast.api import load

        options = {name: value for name, value in vars(self).items() if name not in ("path", "device")}
        return load(self.path, device or self.device, **options)

    def identity(self) -> dict[str, Any]:
        """Return everything that answers depend on: the options, and the checkpoint's contents if it is a folder. The
        device is not included, so that a run may continue on another one.
        """
        found = {name: value for name, value in dataclasses.asdict(self).items() if name != "device" and value}
        place = Path(self.path)
        if place.is_dir():
            found["path"] = place.resolve().name
            found["contents"] = _contents(place)
        return found


def _contents(folder: Path) -> str:
    """Hash the files of a checkpoint: names, sizes, and the beginning and end of each file (weights are large)."""
    found = hashlib.blake2b(digest_size=12)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja") and path.is_file():
            size = path.stat().st_size
            with path.open("rb") as file:
                found.update(f"{path.name} {size}".encode() + file.read(_ENDS))
                file.seek(max(0, size - _ENDS))
                found.update(file.read())
    return found.hexdigest()


def answers_of(
    model: Llava,
    questions: Iterable[Question],
    options: Mapping[str, Any],
    running: int = RUNNING,
    readers: int = READERS,
) -> Iterator[tuple[Question, Answer]]:
    """Yield each question with its answer in the order of completion. Threads preprocess images ahead. Sequences join
    and leave between steps, and equal prefixes (several questions about an image) are computed once. `options` are
    fields of Sampling.

    A question that fails (for example because an image cannot be decoded) gets an Answer with `error`.
    """
    import torch

    from llava_fast.generation.feature_cache import FeatureCache
    from llava_fast.generation.prefix_cache import PrefixCache
    from llava_fast.generation.prompt import Prompt, prompt_of
    from llava_fast.generation.runner import Runner
    from llava_fast.generation.sampling import Sampling
    from llava_fast.generation.scheduler import Scheduler
    from llava_fast.generation.sequence import new_sequence

    sampling = Sampling(**options)
    placed = dataclasses.replace(model.own_processor, threads=1)  # images are preprocessed in parallel
    literal = dataclasses.replace(placed, literal_text=True)
    _ = literal.literal  # built before the threads start

    def prompt_for(question: Question) -> Prompt:
        prompt = prompt_of(placed if question.placed else literal, question.request())
        if prompt.rows >= (limit := model.config.decoder.context_length):
            raise PromptTooLongError(f"the prompt takes {prompt.rows} tokens and the context is {limit}")
        return prompt

    cache = model.decoder.new_cache(keep_bytes=KEPT_BYTES)
    runner = Runner(model, cache, FeatureCache(KEPT_BYTES))
    scheduler = Scheduler(runner, PrefixCache(cache), max_running=running)
    supply = iter(questions)
    reading: deque[tuple[Question, Future[Prompt]]] = deque()
    asked: dict[Sequence, Question] = {}
    with ThreadPoolExecutor(readers) as pool:
        try:
            while True:
                while len(reading) < 2 * running and (question := next(supply, None)) is not None:
                    reading.append((question, pool.submit(prompt_for, question)))
                while reading and len(asked) < running and (reading[0][1].done() or not asked):
                    question, future = reading.popleft()
                    try:
                        sequence = new_sequence(model, future.result(), sampling, sampling.seed)
                        scheduler.add(sequence)
                    except LlavaFastError as error:
                        yield question, Answer("", finish="error", error=str(error))
                        continue
                    asked[sequence] = question
                if not asked and not reading:
                    return
                moved = scheduler.step()
                for sequence, _ in moved:
                    if sequence.finish_reason is not None:
                        if isinstance(sequence.error, torch.AcceleratorError):
                            raise sequence.error
                        yield asked.pop(sequence), _answer(sequence)
        finally:
            for _, future in reading:
                future.cancel()
            for sequence in asked:
                scheduler.cancel(sequence)


def _answer(sequence: Sequence) -> Answer:
    if sequence.error is not None:
        return Answer("", finish="error", error=" ".join(str(sequence.error).split()))
    return Answer(sequence.text.text, len(sequence.token_ids), sequence.prompt.rows, sequence.finish_reason or "length")
