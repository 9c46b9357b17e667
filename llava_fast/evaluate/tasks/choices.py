"""Multiple choice, answered by an option's letter: ScienceQA, MMBench, SEED-Bench, AI2D."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.metrics.choices import LETTERS, bare_letter, infer_option, plain_letter, scienceqa_letter
from llava_fast.evaluate.task import Columns, DataFile, Question, Scored, Task, mean
from llava_fast.evaluate.tasks.rows import find, read_object, read_table, text_of
from llava_fast.inputs.chat.messages import with_response_format


def options_prompt(question: str, options: Sequence[str]) -> str:
    """A question, a line for each option ("A. text"), and LLaVA-1.5's request for the letter."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return with_response_format("\n".join([question, *lines]), "option letter")


class Choices(Task):
    """A question whose `facts` hold its options and whose reference is a letter. `letter` reads it as the task's scorer
    does, from the answer and the number of options."""

    max_new_tokens = 16
    letter: Callable[[str, int], str | None]

    def with_candidates(self, question: Question) -> Question:
        """The letters, after the same prompt."""
        letters = LETTERS[: len(question.facts["options"])]
        return replace(question, candidates=tuple((letter, letter) for letter in letters))

    def read(self, question: Question, text: str) -> str | None:
        return self.letter(text, len(question.facts["options"]))

    def score(self, question: Question, read: str) -> float:
        return float(read == question.reference)


class ScienceQa(Choices):
    """The questions with a picture; the answer is a letter that is generated, not the likeliest option."""

    name = "scienceqa"
    title = "ScienceQA, image subset"
    folder = "scienceqa"
    arguments = "test (default), val, train, or minitest"
    files = (
        DataFile("problems.json", "the questions"),
        DataFile("pid_splits.json", "which question is in which split"),
        DataFile("images", "the pictures, test/5/image.png"),
    )
    source = "https://github.com/lupantech/ScienceQA (data/scienceqa)"
    scorer = "llava/eval/eval_science_qa.py, IMG-Accuracy; `llava-fast judge` ensembles with a language model"
    letter = staticmethod(scienceqa_letter)

    def questions(self, folder: Path) -> list[Question]:
        split = self.argument or "test"
        problems = read_object(find(folder, self.files[0], self.name))
        pictures = find(folder, self.files[2], self.name)
        found = []
        for number in read_object(find(folder, self.files[1], self.name)).texts(split):
            row = problems.row(number)
            if not row.get("image"):
                continue
            choices, answer, text = row.texts("choices"), row.whole("answer"), row.text("question")
            if not 0 <= answer < len(choices):
                raise EvaluationError(f"{row.where}: 'answer' is {answer}, and there are {len(choices)} choices")
            hint = row.get("hint") or ""
            asked = f"Context: {hint}\n{text}" if hint else text
            path = pictures / (row.get("split") or split) / number / row.text("image")
            categories = tuple(str(row.get(key)) for key in ("subject", "grade") if row.get(key))
            facts = {"options": choices, "hint": hint}
            reference = LETTERS[answer]
            prompt = options_prompt(asked, choices)
            found.append(Question(number, text, prompt, (str(path),), reference, categories, facts=facts))
        return found

    def columns(self, unit: Sequence[Scored]) -> dict[str, float]:
        return {**super().columns(unit), **unit[0].marks}

    def metrics(self, columns: Columns, weights: np.ndarray) -> dict[str, float]:
        """The model's accuracy; where a judge has answered too, its own, and those of both (judge/judges.py)."""
        marks = {name: 100 * mean(values, weights) for name, values in columns.items() if name != "score"}
        return {**super().metrics(columns, weights), **marks}


class MmBench(Choices):
    """Every question is asked once for each of its options, which rotate by one; a question counts only if all its
    passes are right (circular evaluation).
    """

    name = "mmbench"
    title = "MMBench, circular"
    folder = "mmbench"
    files = (
        DataFile(
            "mmbench_dev_20230712.tsv",
            "questions, options, answers and pictures",
            ("mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv"),
        ),
    )
    source = "https://github.com/open-compass/MMBench"
    scorer = "circular evaluation (arXiv 2307.06281, section 4) without a language model: unreadable answers are wrong"
    main = "circular accuracy"

    def questions(self, folder: Path) -> list[Question]:
        found = []
        for row in read_table(find(folder, self.files[0], self.name)):
            number = row.number("index")
            if int(number) >= 1_000_000:  # a file that holds the rotated passes as rows of their own
                continue
            options = []
            for letter in "ABCD":
                option = row.get(letter)
                if _is_absent(option):
                    break
                options.append(option)
            answer = row.get("answer")
            if answer is not None and answer not in LETTERS[: len(options)]:
                raise EvaluationError(f"{row.where}: 'answer' is {answer!r}, and the options are {len(options)}")
            try:
                image = base64.b64decode(row.text("image"), validate=True)
            except binascii.Error:
                raise EvaluationError(f"{row.where}: 'image' is no picture in base64") from None
            picture = hashlib.blake2b(image, digest_size=8).hexdigest()
            hint, text = row.get("hint"), row.text("question")
            asked = text if _is_absent(hint) else f"{hint}\n{text}"
            categories = tuple(row.get(key) for key in ("l2-category", "category") if row.get(key))
            for turn in range(len(options)):
                shown = options[turn:] + options[:turn]
                right = None if answer is None else LETTERS[(LETTERS.index(answer) - turn) % len(options)]
                found.append(
                    Question(
                        f"{number}-{turn}",
                        text,
                        options_prompt(asked, shown),
                        (image,),
                        right,
                        categories,
                        unit=number,
                        cluster=picture,
                        facts={"options": shown},
                    )
                )
        return found

    def read(self, question: Question, text: str) -> str | None:
        return infer_option(text, dict(zip(LETTERS, question.facts["options"], strict=False)))

    def columns(self, unit: Sequence[Scored]) -> dict[str, float]:
        scores = [scored.score or 0.0 for scored in unit]
        first = next((s.score or 0.0 for s in unit if s.question.id.endswith("-0")), scores[0])
        return {"all": float(min(scores)), "first": float(first)}

    def metrics(self, columns: Columns, weights: np.ndarray) -> dict[str, float]:
        return {
            self.main: 100 * mean(columns["all"], weights),
            "accuracy of the first pass": 100 * mean(columns["first"], weights),
        }


def _is_absent(field: str | None) -> bool:
    """Whether a table's field is empty, or what pandas writes for an empty one."""
    return field is None or field.lower() in ("nan", "none")


class Seed(Choices):
    name = "seed"
    title = "SEED-Bench, image questions"
    folder = "seed_bench"
    files = (
        DataFile("SEED-Bench.json", "questions, options and answers"),
        DataFile("SEED-Bench-image", "the pictures"),
    )
    source = "https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md"
    scorer = (
        "scripts/convert_seed_for_submission.py of the original LLaVA (image accuracy); its video questions are not"
    )
    letter = staticmethod(bare_letter)

    def with_candidates(self, question: Question) -> Question:
        """The options' texts, after the question alone, as SEED-Bench's own evaluation ranks them."""
        options = zip(LETTERS, question.facts["options"], strict=False)
        return replace(question, prompt=question.text, candidates=tuple(options))

    def questions(self, folder: Path) -> list[Question]:
        data = read_object(find(folder, self.files[0], self.name))
        pictures = find(folder, self.files[1], self.name)
        kinds = {number: name for name, number in data.object("question_type").items()}
        found = []
        for row in data.rows("questions"):
            if row.get("data_type", "image") != "image":
                continue
            text, options = row.text("question"), [row.text(f"choice_{letter}") for letter in "abcd"]
            kind = kinds.get(row.any("question_type_id"), str(row.any("question_type_id")))
            path = str(pictures / row.text("data_id"))
            prompt = options_prompt(text, options)
            facts = {"options": options}
            answer = row.get("answer")
            found.append(Question(row.id("question_id"), text, prompt, (path,), answer, (kind,), facts=facts))
        return found


class Ai2d(Choices):
    name = "ai2d"
    title = "AI2D"
    folder = "ai2d"
    files = (
        DataFile("questions", "a JSON file for each picture, 0.png.json"),
        DataFile("images", "the pictures, 0.png"),
        DataFile("ai2d_test_ids.csv", "the numbers of the test pictures, a line each"),
    )
    source = "https://prior.allenai.org/projects/diagram-understanding"
    scorer = "accuracy of the letter but for case and punctuation, as lmms-eval's ai2d (exact_match, no filter)"
    letter = staticmethod(plain_letter)

    def questions(self, folder: Path) -> list[Question]:
        asked, pictures = (find(folder, file, self.name) for file in self.files[:2])
        tested = text_of(find(folder, self.files[2], self.name)).replace(",", " ").split()
        found = []
        for picture in tested:
            file = asked / f"{picture}.png.json"
            if not file.exists():
                raise EvaluationError(f"ai2d: {self.files[2].path} names picture {picture}, and there is no {file}")
            asked_of = read_object(file).row("questions")
            for text in asked_of.value:
                row = asked_of.row(text)
                options, answer = row.texts("answerTexts"), row.whole("correctAnswer")
                if not 0 <= answer < len(options):
                    raise EvaluationError(f"{row.where}: 'correctAnswer' is {answer} of {len(options)} answers")
                prompt = options_prompt(text, options)
                path = str(pictures / f"{picture}.png")
                facts: dict[str, Any] = {"options": options}
                found.append(Question(row.id("questionId"), text, prompt, (path,), LETTERS[answer], facts=facts))
        return found
