"""The model of an evaluation: loading, identification, and answering with continuous batching."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llava_fast.batch.digest import model_digest
from llava_fast.evaluate.task import Answer, Question
from llava_fast.storage.hub import local_directory

if TYPE_CHECKING:
    from llava_fast.generation.llava import Llava
    from llava_fast.inputs.processor import Processor

RUNNING = 32  # maximum number of running sequences


@dataclass(frozen=True)
class ModelSpec:
    """The arguments of `llava_fast.load`. It can be pickled."""

    path: str
    device: str | None = None
    dtype: str | None = None
    chat_template: str | None = None
    model_base: str | None = None
    quantize: str | None = None
    kv_cache: str | None = None

    def load(self, device: str | None = None) -> Llava:
        from llava_fast.api import load

        options = {name: value for name, value in vars(self).items() if name not in ("path", "device")}
        return load(self.path, device or self.device, **options)

    def identity(self) -> dict[str, Any]:
        """Return everything that answers depend on: the options, and the checkpoint's contents if it is a folder. The
        device is not included, so that a run may continue on another one.
        """
        found = {name: value for name, value in dataclasses.asdict(self).items() if name != "device" and value}
        if (place := local_directory(self.path)) is not None:
            found["path"] = place.resolve().name
            found["contents"] = model_digest(place)
        if self.model_base and (base := local_directory(self.model_base)) is not None:
            found["model_base"] = model_digest(base)
        return found


def answers_of(
    model: Llava, questions: Sequence[Question], options: Mapping[str, Any], running: int = RUNNING
) -> Iterator[tuple[Question, Answer]]:
    """Yield each question with its answer, in the order in which answers end (see batch.answering). `options` are
    fields of Sampling; or {"choose": "likelihood" | "mean_likelihood"}, for questions with candidates.

    A question that cannot be asked (an image that cannot be decoded) or whose answer fails gets an Answer with `error`.
    """
    if "choose" in options:
        yield from _chosen(model, questions, options["choose"], running)
        return

    from llava_fast.batch.answering import Answerer, Settings
    from llava_fast.batch.items import Item
    from llava_fast.generation.sampling import Sampling

    class Asker(Answerer):
        def request(self, item: Item) -> dict[str, Any]:
            return item.columns["question"].request()

        def seed(self, item: Item) -> int | None:
            return self.settings.sampling.seed  # item numbers depend on what else is asked

    for placed in (False, True):
        asked = [question for question in questions if question.placed is placed]
        settings = Settings(
            prompt="", sampling=Sampling(**options), literal_text=not placed, max_running=running, repeats=True
        )
        items = (Item(number, question.id, {"question": question}) for number, question in enumerate(asked))
        if asked:
            made: Any = Asker(model, settings).steps(items)
            with contextlib.closing(made) as steps:
                for rows in steps:
                    for number, row in rows:
                        yield asked[number], _answer(row)


def _chosen(
    model: Llava, questions: Sequence[Question], choose: str, running: int
) -> Iterator[tuple[Question, Answer]]:
    """Each question with its likeliest candidate; the first of equal ones."""
    from llava_fast.errors import LlavaFastError
    from llava_fast.generation.ranking import Candidate, score_candidates

    def score(candidate: Candidate) -> float:
        return candidate.mean_log_likelihood if choose == "mean_likelihood" else candidate.log_likelihood

    def ranked(part: Sequence[Question], processor: Processor) -> Iterator[tuple[Question, Answer]]:
        texts = [[text for _, text in question.candidates] for question in part]
        try:
            found = score_candidates(model, [each.request() for each in part], texts, processor=processor)
        except LlavaFastError as error:
            if len(part) == 1:
                yield part[0], Answer("", finish="error", error=" ".join(str(error).split()))
                return
            for question in part:  # only the faulty one gets the error
                yield from ranked([question], processor)
            return
        for question, candidates in zip(part, found, strict=True):
            best = max(candidates, key=score)
            answer = question.candidates[best.index][0]
            yield question, Answer(answer, len(best.token_ids), best.prompt_tokens)

    for placed in (False, True):
        asked = [question for question in questions if question.placed is placed]
        literal = dataclasses.replace(model.own_processor, literal_text=not placed)
        for first in range(0, len(asked), running):
            yield from ranked(asked[first : first + running], literal)


def _answer(row: Mapping[str, Any]) -> Answer:
    if "error" in row:
        return Answer("", finish="error", error=" ".join(str(row["error"]).split()))
    usage = row["usage"]
    return Answer(row["answer"], usage["completion_tokens"], usage["prompt_tokens"], row["finish_reason"])
