"""Free answers that a language model judges (`llava-fast judge`): LLaVA-Bench and MM-Vet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.task import Columns, DataFile, Question, Scored, Task, mean, ratio
from llava_fast.evaluate.tasks.rows import find, read_object, read_rows


class OpenEnded(Task):
    judged = True
    max_new_tokens = 1024  # as llava/eval/model_vqa.py


class Paired(OpenEnded):
    """A judge gives marks from 1 to 10 to the reference and to the model; the metric is their means' ratio, as
    llava/eval/summarize_gpt_review.py computes it.
    """

    main = "relative score"

    def columns(self, unit: Sequence[Scored]) -> dict[str, float]:
        return dict(unit[0].marks)

    def metrics(self, columns: Columns, weights: np.ndarray) -> dict[str, float]:
        reference, model = (mean(columns[name], weights) for name in ("reference", "model"))
        return {
            self.main: 100 * ratio(model, reference),
            "reference's score": 10 * reference,
            "model's score": 10 * model,
        }


class BenchInTheWild(Paired):
    name = "llava-bench"
    title = "LLaVA-Bench (In-the-Wild)"
    folder = "llava-bench-in-the-wild"
    files = (
        DataFile("questions.jsonl", "the questions"),
        DataFile("context.jsonl", "the captions that the judge reads"),
        DataFile("answers_gpt4.jsonl", "the text-only reference's answers"),
        DataFile("images", "the pictures"),
    )
    source = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
    scorer = "score relative to the reference's (arXiv 2304.08485, section 5.1), by `llava-fast judge`"
    image_prefix = ""

    def questions(self, folder: Path) -> list[Question]:
        asked, context, answers, images = (find(folder, file, self.name) for file in self.files)
        contexts = {row.text("image"): self.context(row) for row in read_rows(context)}
        references = {row.id("question_id"): row.text("text") for row in read_rows(answers)}
        found = []
        for row in read_rows(asked):
            number, image, text = row.id("question_id"), row.text("image"), row.text("text")
            if image not in contexts:
                raise EvaluationError(f"{context.name} has nothing of picture {image} ({row.where})")
            if number not in references:
                raise EvaluationError(f"{answers.name} has no answer to question {number}")
            facts = {"context": contexts[image]}
            path = str(images / f"{self.image_prefix}{image}")
            kind = (row.text("category"),)
            found.append(Question(number, text, text, (path,), references[number], kind, facts=facts))
        return found

    def context(self, row: Any) -> str:
        """What the judge reads of a picture."""
        caption = row.any("caption", "captions")
        return "\n".join(caption) if isinstance(caption, list) else str(caption)


class BenchCoco(BenchInTheWild):
    name = "llava-bench-coco"
    title = "LLaVA-Bench (COCO)"
    folder = "coco2014_val_qa_eval"
    files = (
        DataFile("qa90_questions.jsonl", "the questions"),
        DataFile("caps_boxes_coco2014_val_80.jsonl", "captions and boxes that the judge reads"),
        DataFile("qa90_gpt4_answer.jsonl", "the text-only reference's answers"),
        DataFile("val2014", "COCO's pictures"),
    )
    source = "https://github.com/haotian-liu/LLaVA: playground/data/coco2014_val_qa_eval; llava/eval/table: captions"
    image_prefix = "COCO_val2014_"

    def context(self, row: Any) -> str:
        boxes = [f"{box.text('category')}: {box.any('bbox')}" for box in row.rows("instances")]
        return "\n".join([super().context(row), "", *boxes])


class BenchWilder(Paired):
    name = "llava-bench-wilder"
    title = "LLaVA-Bench (Wilder)"
    folder = "llava-bench-wilder"
    files = (
        DataFile("questions.jsonl", "question_id, image, Question, Answer and Category of each sample of the data set"),
        DataFile("images", "the pictures"),
    )
    source = "https://huggingface.co/datasets/lmms-lab/LLaVA-Bench-Wilder (write its rows as JSON lines)"
    scorer = "score relative to the reference, which gets 10; the judge sees the picture. By `llava-fast judge`"

    def questions(self, folder: Path) -> list[Question]:
        asked, images = (find(folder, file, self.name) for file in self.files)
        found = []
        for row in read_rows(asked):
            text = row.text("Question", "question")
            path = str(images / row.text("image"))
            kind = tuple(str(row.get(key)) for key in ("Category", "category") if row.get(key))[:1]
            found.append(Question(row.id("question_id"), text, text, (path,), row.text("Answer", "answer"), kind))
        return found


class MmVet(OpenEnded):
    """A question counts for each of its capabilities, and for their combination."""

    main = "score"
    name = "mm-vet"
    title = "MM-Vet"
    folder = "mm-vet"
    files = (
        DataFile("mm-vet.json", "questions, answers and capabilities"),
        DataFile("images", "the pictures"),
    )
    source = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"
    scorer = "mm-vet_evaluator.py: a language model's score from 0 to 1, by `llava-fast judge`"

    def questions(self, folder: Path) -> list[Question]:
        asked, images = (find(folder, file, self.name) for file in self.files)
        found = []
        data = read_object(asked)
        for number in data.value:
            row = data.row(number)
            text, capabilities = row.text("question"), sorted(row.texts("capability"))
            kinds = (*capabilities, "_".join(capabilities)) if len(capabilities) > 1 else tuple(capabilities)
            path = str(images / row.text("imagename"))
            found.append(Question(number, text, text, (path,), row.text("answer"), kinds))
        return found

    def submission(self, scored: Iterable[Scored]) -> Any:
        return {each.question.id: each.answer.text for each in scored}
