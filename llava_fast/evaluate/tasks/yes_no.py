"""Yes or no: POPE and MME."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.metrics.choices import mme_answer, pope_answer
from llava_fast.evaluate.task import Columns, DataFile, Question, Scored, Task, Units, mean, ratio
from llava_fast.evaluate.tasks.rows import find, read_rows, text_of
from llava_fast.inputs.chat.messages import with_response_format


class Pope(Task):
    name = "pope"
    title = "POPE"
    folder = "pope"
    files = (
        DataFile("coco_pope_random.json", "the random questions", ("coco/coco_pope_random.json",)),
        DataFile("coco_pope_popular.json", "the popular questions", ("coco/coco_pope_popular.json",)),
        DataFile("coco_pope_adversarial.json", "the adversarial questions", ("coco/coco_pope_adversarial.json",)),
        DataFile("val2014", "COCO's pictures"),
    )
    source = "https://github.com/AoiDragon/POPE/tree/main/output/coco"
    scorer = "POPE's evaluate.py and llava/eval/eval_pope.py; `mean F1` is that of the three, as LLaVA-1.5 reports it"
    main = "mean F1"

    def questions(self, folder: Path) -> list[Question]:
        pictures = find(folder, self.files[3], self.name)
        found = []
        for kind, file in zip(("random", "popular", "adversarial"), self.files, strict=False):
            for row in read_rows(find(folder, file, self.name)):
                text, label = row.text("text"), row.text("label")
                if label not in ("yes", "no"):
                    raise EvaluationError(f"{row.where}: 'label' is {label!r}, not 'yes' or 'no'")
                path = str(pictures / row.text("image"))
                number = f"{kind}-{row.id('question_id')}"
                found.append(Question(number, text, with_response_format(text, "short"), (path,), label, (kind,)))
        return found

    def read(self, question: Question, text: str) -> str:
        return pope_answer(text.strip())

    def score(self, question: Question, read: str) -> float:
        return float(read == question.reference)

    def columns(self, unit: Sequence[Scored]) -> dict[str, float]:
        """One question: which of the four cases it is. A failed answer is a wrong one."""
        (scored,) = unit
        yes = scored.question.reference == "yes"
        right = bool(scored.score)
        names = {"TP": yes and right, "FN": yes and not right, "TN": not yes and right, "FP": not yes and not right}
        return {name: float(case) for name, case in names.items()}

    def metrics(self, columns: Columns, weights: np.ndarray) -> dict[str, float]:
        tp, fp, tn, fn = (float(columns[name] @ weights) for name in ("TP", "FP", "TN", "FN"))
        precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
        found = {
            "F1": ratio(2 * tp, 2 * tp + fp + fn),
            "accuracy": ratio(tp + tn, tp + fp + tn + fn),
            "precision": precision,
            "recall": recall,
            "yes ratio": ratio(tp + fp, tp + fp + tn + fn),
        }
        return {name: 100 * value for name, value in found.items()}

    def overall(self, units: Units, weights: np.ndarray) -> dict[str, float]:
        each = [self.metrics(units.of(chosen), weights[chosen])["F1"] for chosen in units.by_category.values()]
        return {self.main: float(np.mean(each)), **self.metrics(units.columns, weights)}


PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MME_FORMAT = "Please answer yes or no."


class Mme(Task):
    """Two questions a picture; a category's score is accuracy plus accuracy+ (both questions right), at most 200."""

    name = "mme"
    title = "MME"
    folder = "MME/MME_Benchmark_release_version"
    files = tuple(DataFile(name, "a category's questions and pictures") for name in PERCEPTION + COGNITION)
    source = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
    scorer = "eval_tool/calculation.py; prompts as the original LLaVA's llava_mme.jsonl"
    main = "perception"
    unit = "points"

    def questions(self, folder: Path) -> list[Question]:
        found = []
        for category in PERCEPTION + COGNITION:
            place = find(folder, DataFile(category, "a category's questions and pictures"), self.name)
            texts = place / "questions_answers_YN" if (place / "questions_answers_YN").is_dir() else place
            pictures = place / "images" if (place / "images").is_dir() else place
            files = sorted(texts.glob("*.txt"))
            if not files:
                raise EvaluationError(f"mme: {texts} holds no .txt file of questions")
            for file in files:
                found += self._questions(category, file, pictures)
        return found

    def _questions(self, category: str, file: Path, pictures: Path) -> list[Question]:
        images = [pictures / f"{file.stem}{ending}" for ending in (".jpg", ".png", ".jpeg")]
        image = next((path for path in images if path.exists()), images[0])
        found = []
        for number, line in enumerate(text_of(file).splitlines()):
            if not line.strip():
                continue
            text, _, answer = (part.strip() for part in line.partition("\t"))
            if answer.lower() not in ("yes", "no"):
                raise EvaluationError(f"{file}, line {number + 1}: {answer!r} after the tab is not Yes or No")
            asked = text.replace(MME_FORMAT, "").strip()
            unit = f"{category}/{file.stem}"
            prompt = with_response_format(asked, "short")
            reference = answer.lower()
            found.append(
                Question(f"{unit}-{number}", asked, prompt, (str(image),), reference, (category,), unit, cluster=unit)
            )
        if len(found) != 2:
            raise EvaluationError(f"{file} holds {len(found)} questions: MME has two for each picture")
        return found

    def read(self, question: Question, text: str) -> str | None:
        return mme_answer(text)

    def score(self, question: Question, read: str) -> float:
        return float(read == question.reference)

    def columns(self, unit: Sequence[Scored]) -> dict[str, float]:
        scores = [scored.score or 0.0 for scored in unit]
        return {"accuracy": float(np.mean(scores)), "accuracy+": float(min(scores))}

    def metrics(self, columns: Columns, weights: np.ndarray) -> dict[str, float]:
        found = {name: 100 * mean(columns[name], weights) for name in ("accuracy", "accuracy+")}
        return {"score": found["accuracy"] + found["accuracy+"], **found}

    def overall(self, units: Units, weights: np.ndarray) -> dict[str, float]:
        by_category = units.by_category.items()
        scores = {name: self.metrics(units.of(chosen), weights[chosen])["score"] for name, chosen in by_category}
        totals = {
            "perception": sum(scores[name] for name in PERCEPTION if name in scores),
            "cognition": sum(scores[name] for name in COGNITION if name in scores),
        }
        every = self.metrics(units.columns, weights)
        return {**totals, "accuracy": every["accuracy"], "accuracy+": every["accuracy+"]}
