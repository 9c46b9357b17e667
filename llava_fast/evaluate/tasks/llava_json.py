"""The user's own questions, in LLaVA's format: `llava:FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_fast.errors import DataError, EvaluationError
from llava_fast.evaluate.metrics.text import anls
from llava_fast.evaluate.task import Columns, DataFile, Question, Scored, Task, mean
from llava_fast.evaluate.tasks.rows import find
from llava_fast.inputs.chat.messages import IMAGE_PLACEHOLDER
from llava_fast.train.data.samples import Source, read_sources


class LlavaJson(Task):
    """Every answer of a conversation is a question of its own; it follows the file's turns before it. A conversation
    that ends with a question has no reference for it, so that answer is written and gets no score.
    """

    name = "llava"
    title = "LLaVA-format questions"
    arguments = "the file: llava:questions.json"
    files = (DataFile("FILE", "a LLaVA-format .json or .jsonl; its pictures are relative to --data, or to the file"),)
    source = "yours"
    scorer = "exact match, but for case, outer spaces and a final period; and ANLS (see docvqa)"
    main = "exact match"
    max_new_tokens = 128

    def questions(self, folder: Path) -> list[Question]:
        if not self.argument:
            raise EvaluationError("the task llava needs its file: llava:questions.json")
        file = Path(self.argument)
        if not file.exists():
            file = find(folder, DataFile(self.argument, "LLaVA-format questions"), self.name)
        images = str(folder) if folder != Path() else str(file.parent)
        found: list[Question] = []
        try:
            table = read_sources([Source(path=str(file), images=images)])
            for number in range(len(table)):
                found += self._of_sample(number, table[number].request)
        except DataError as error:
            raise EvaluationError(str(error)) from None
        return found

    def _of_sample(self, number: int, request: dict) -> list[Question]:
        if "video" in request:
            raise EvaluationError(f"{request['id']}: it has a video; evaluation reads pictures")
        turns, images, found = request["messages"], tuple(request["images"]), []
        for at, turn in enumerate(turns):
            if turn["role"] != "user":
                continue
            if not isinstance(turn["content"], str):
                raise EvaluationError(f"{request['id']}: a message is a list of items; write it as a text with <image>")
            answer = turns[at + 1]["content"] if at + 1 < len(turns) else None
            shown = sum(str(each["content"]).count(IMAGE_PLACEHOLDER) for each in turns[: at + 1])
            found.append(
                Question(
                    f"{number}-{at}",
                    turn["content"].replace(IMAGE_PLACEHOLDER, "").strip(),
                    turn["content"],
                    images[:shown],
                    answer,
                    cluster=images[0] if images else str(number),
                    history=tuple(turns[:at]),
                    placed=True,
                )
            )
        return found

    def score(self, question: Question, read: str) -> float:
        return float(_plain(read) == _plain(question.reference))

    def columns(self, unit: Sequence[Scored]) -> dict[str, float]:
        (scored,) = unit
        near = 0.0 if scored.read is None else anls(scored.read, [scored.question.reference])
        return {"score": scored.score or 0.0, "anls": near}

    def metrics(self, columns: Columns, weights: np.ndarray) -> dict[str, float]:
        return {**super().metrics(columns, weights), "ANLS": 100 * mean(columns["anls"], weights)}


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").lower()
