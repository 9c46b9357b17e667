"""Short answers scored by VQA accuracy: VQAv2, VizWiz, TextVQA."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.metrics.vqa import evalai_accuracy, normalise_evalai, vqa_accuracy
from llava_fast.evaluate.task import DataFile, Question, Scored, Task
from llava_fast.evaluate.tasks.rows import find, read_object, read_rows
from llava_fast.inputs.chat.messages import RESPONSE_FORMATS, with_response_format

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
VQA_SPLITS = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015", "train": "train2014"}


class Vqav2(Task):
    name = "vqav2"
    title = "VQAv2"
    folder = "vqav2"
    arguments = "val (default), train, test-dev or test; test splits have no answers, so they get no score"
    files = (
        DataFile("v2_OpenEnded_mscoco_val2014_questions.json", "the questions"),
        DataFile("v2_mscoco_val2014_annotations.json", "the answers; not for a test split"),
        DataFile("val2014", "COCO's pictures, COCO_val2014_000000000042.jpg; test splits: test2015"),
    )
    source = "https://visualqa.org/download.html"
    scorer = (
        "github.com/GT-Vision-Lab/VQA, vqaEval.py, of the answer normalised as LLaVA's "
        "scripts/convert_vqav2_for_submission.py does"
    )

    def questions(self, folder: Path) -> list[Question]:
        split = self.argument or "val"
        if split not in VQA_SPLITS:
            raise EvaluationError(f"vqav2 has no split {split!r}: use {', '.join(VQA_SPLITS)}")
        name = VQA_SPLITS[split]
        asked = find(folder, DataFile(f"v2_OpenEnded_mscoco_{name}_questions.json", "the questions"), self.name)
        known: dict[str, dict[str, Any]] = {}
        answered = not split.startswith("test")
        if answered:
            file = find(folder, DataFile(f"v2_mscoco_{name}_annotations.json", "the answers"), self.name)
            for row in read_object(file).rows("annotations"):
                known[row.number("question_id")] = {
                    "answers": [each.text("answer") for each in row.rows("answers")],
                    "categories": (row.text("answer_type"), f"question: {row.text('question_type')}"),
                }
        pictures = name if answered else "test2015"
        found = []
        for row in read_object(asked).rows("questions"):
            number, text = row.number("question_id"), row.text("question")
            if answered and number not in known:
                raise EvaluationError(f"{row.where}: question {number} has no annotation")
            image = folder / pictures / f"COCO_{pictures}_{row.whole('image_id'):012d}.jpg"
            facts = known.get(number, {"answers": None, "categories": ()})
            found.append(
                Question(
                    number,
                    text,
                    with_response_format(text, "short"),
                    (str(image),),
                    facts["answers"],
                    facts["categories"],
                )
            )
        return found

    def read(self, question: Question, text: str) -> str:
        return normalise_evalai(text)

    def score(self, question: Question, read: str) -> float:
        return vqa_accuracy(read, question.reference)

    def submission(self, scored: Iterable[Scored]) -> Any:
        return [{"question_id": int(each.question.id), "answer": each.read or ""} for each in scored]


class VizWiz(Task):
    name = "vizwiz"
    title = "VizWiz-VQA"
    folder = "vizwiz"
    arguments = "val (default), train or test; test has no answers"
    files = (
        DataFile("val.json", "questions and answers"),
        DataFile("val", "the pictures, VizWiz_val_00000000.jpg"),
    )
    source = "https://vizwiz.org/tasks-and-datasets/vqa/"
    scorer = (
        "VQA accuracy (vqaEval.py) of the answer normalised as LLaVA's scripts/convert_vizwiz_for_submission.py does"
    )

    def questions(self, folder: Path) -> list[Question]:
        split = self.argument or "val"
        pictures = folder / split
        found = []
        for row in read_rows(find(folder, DataFile(f"{split}.json", "questions and answers"), self.name)):
            image, text = row.text("image"), row.text("question")
            answers = [each.text("answer") for each in row.rows("answers")] if row.get("answers") else None
            kind = (row.get("answer_type") or "other",) if answers else ()
            prompt = f"{text}\n{UNANSWERABLE}\n{RESPONSE_FORMATS['short']}"
            found.append(Question(image, text, prompt, (str(pictures / image),), answers, kind))
        return found

    def read(self, question: Question, text: str) -> str:
        return normalise_evalai(text)

    def score(self, question: Question, read: str) -> float:
        return vqa_accuracy(read, question.reference)

    def submission(self, scored: Iterable[Scored]) -> Any:
        return [{"image": each.question.id, "answer": each.read or ""} for each in scored]


class TextVqa(Task):
    """`ocr`: the published OCR tokens go with the question, as in LLaVA-1.5's figures."""

    name = "textvqa"
    title = "TextVQA"
    folder = "textvqa"
    files: tuple[DataFile, ...] = (
        DataFile("TextVQA_0.5.1_val.json", "questions and answers"),
        DataFile("train_images", "the pictures of train and val"),
    )
    source = "https://textvqa.org/dataset/"
    scorer = "llava/eval/m4c_evaluator.py (M4C's, EvalAI's normalisation)"
    ocr = False

    def questions(self, folder: Path) -> list[Question]:
        tokens = self._tokens(folder) if self.ocr else {}
        pictures = find(folder, self.files[1], self.name)
        found = []
        for row in read_object(find(folder, self.files[0], self.name)).rows("data"):
            image, text = row.text("image_id"), row.text("question")
            prompt = text
            if self.ocr:
                if image not in tokens:
                    raise EvaluationError(f"{self.files[2].path} has no OCR tokens of picture {image}")
                prompt = f"{text}\nReference OCR token: {', '.join(tokens[image])}"
            path = str(pictures / f"{image}.jpg")
            answers = row.texts("answers") if row.get("answers") else None
            found.append(
                Question(row.number("question_id"), text, with_response_format(prompt, "short"), (path,), answers)
            )
        return found

    def _tokens(self, folder: Path) -> dict[str, list[str]]:
        rows = read_object(find(folder, self.files[2], self.name)).rows("data")
        return {row.text("image_id"): row.get("ocr_tokens") or [] for row in rows}

    def score(self, question: Question, read: str) -> float:
        return evalai_accuracy(read, question.reference)

    def submission(self, scored: Iterable[Scored]) -> Any:
        return [{"question_id": int(each.question.id), "answer": each.answer.text.strip()} for each in scored]


class TextVqaOcr(TextVqa):
    name = "textvqa-ocr"
    title = "TextVQA with OCR tokens"
    files = (*TextVqa.files, DataFile("TextVQA_Rosetta_OCR_v0.2_val.json", "the OCR tokens"))
    ocr = True
