"""The model of an evaluation: how to load it, what identifies it, and its answers by continuous batching."""

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

RUNNING = 32  # sequences at once
READERS = 2  # threads that read and cut pictures ahead
KEPT_BYTES = 256 << 20  # of keys and values, and of image features, for pictures that come again
_ENDS = 1 << 16


@dataclass(frozen=True)
class ModelSpec:
    """What `llava_fast.load` is given; it can be sent to another process."""

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
        """What answers depend on: the options, and the checkpoint's contents where it is a folder. The device is left
        out: a run may go on elsewhere.
        """
        found = {name: value for name, value in dataclasses.asdict(self).items() if name != "device" and value}
        place = Path(self.path)
        if place.is_dir():
            found["path"] = place.resolve().name
            found["contents"] = _contents(place)
        return found


def _contents(folder: Path) -> str:
    """A hash of a checkpoint's files: names, sizes, and both ends of each (weights are large)."""
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
    """Each question with its answer, as answers end. Pictures are read ahead by threads; sequences join and leave
    between steps, and rows of equal prefixes (one picture, several questions) run once. `options`: fields of Sampling.

    A question that cannot be asked (a picture that cannot be decoded) or fails gets an Answer with `error`.
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
    placed = dataclasses.replace(model.own_processor, threads=1)  # pictures are read side by side
    literal = dataclasses.replace(placed, literal_text=True)
    _ = literal.literal  # made now: every thread would make its own

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
