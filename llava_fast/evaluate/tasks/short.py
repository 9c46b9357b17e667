"""Short answers with one reference or a few: GQA, ChartQA, DocVQA."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_fast.evaluate.metrics.text import anls, relaxed_match
from llava_fast.evaluate.task import DataFile, Question, Scored, Task
from llava_fast.evaluate.tasks.rows import find, read_object, read_rows
from llava_fast.inputs.chat.messages import with_response_format


class Gqa(Task):
    name = "gqa"
    title = "GQA"
    folder = "gqa/data"
    arguments = "testdev (default) or val"
    files = (
        DataFile("testdev_balanced_questions.json", "questions and answers"),
        DataFile("images", "the pictures, n161313.jpg"),
    )
    source = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
    scorer = (
        "GQA's eval.py: accuracy, binary and open, by structural and semantic type; answers as LLaVA's "
        "scripts/convert_gqa_for_eval.py writes them. Consistency, validity, plausibility and distribution need other "
        "files and are not computed"
    )

    def questions(self, folder: Path) -> list[Question]:
        split = self.argument or "testdev"
        file = find(folder, DataFile(f"{split}_balanced_questions.json", "questions and answers"), self.name)
        pictures = find(folder, self.files[1], self.name)
        found = []
        data = read_object(file)
        for number in data.value:
            row = data.row(number)
            text, types = row.text("question"), row.row("types")
            structural = types.text("structural")
            categories = (
                "open" if structural == "query" else "binary",
                f"structural: {structural}",
                f"semantic: {types.text('semantic')}",
            )
            path = str(pictures / f"{row.id('imageId')}.jpg")
            prompt = with_response_format(text, "short")
            found.append(Question(number, text, prompt, (path,), row.text("answer"), categories))
        return found

    def read(self, question: Question, text: str) -> str:
        return text.strip().rstrip(".").lower()

    def score(self, question: Question, read: str) -> float:
        return float(read == question.reference)

    def submission(self, scored: Iterable[Scored]) -> Any:
        return [{"questionId": each.question.id, "prediction": each.read or ""} for each in scored]


class ChartQa(Task):
    name = "chartqa"
    title = "ChartQA"
    folder = "ChartQA Dataset"
    arguments = "test (default), val or train"
    files = (
        DataFile("test/test_human.json", "questions that people wrote"),
        DataFile("test/test_augmented.json", "questions made from summaries"),
        DataFile("test/png", "the pictures"),
    )
    source = "https://github.com/vis-nlp/ChartQA"
    scorer = (
        "relaxed accuracy (arXiv 2203.10244, section 5.1); prompt as lmms-eval's, which LLaVA-NeXT's figures are by"
    )
    main = "relaxed accuracy"

    def questions(self, folder: Path) -> list[Question]:
        split = self.argument or "test"
        pictures = find(folder, DataFile(f"{split}/png", "the pictures"), self.name)
        found = []
        for kind in ("human", "augmented"):
            file = DataFile(f"{split}/{split}_{kind}.json", "questions and answers")
            for number, row in enumerate(read_rows(find(folder, file, self.name))):
                text = row.text("query")
                prompt = f"{text}\nAnswer the question with a single word."
                path = str(pictures / row.text("imgname"))
                found.append(Question(f"{kind}-{number}", text, prompt, (path,), row.text("label"), (kind,)))
        return found

    def score(self, question: Question, read: str) -> float:
        return float(relaxed_match(read, question.reference))


class DocVqa(Task):
    name = "docvqa"
    title = "DocVQA"
    folder = "docvqa"
    arguments = "val (default), train or test; test has no answers"
    files = (
        DataFile("val_v1.0_withQT.json", "questions and answers", ("val_v1.0.json",)),
        DataFile("documents", "the pictures", ("val/documents",)),
    )
    source = "https://rrc.cvc.uab.es/?ch=17&com=downloads"
    scorer = "ANLS (arXiv 2007.00398 and the challenge's script)"
    main = "ANLS"
    max_new_tokens = 128

    def questions(self, folder: Path) -> list[Question]:
        split = self.argument or "val"
        file = DataFile(f"{split}_v1.0_withQT.json", "questions and answers", (f"{split}_v1.0.json",))
        pictures = find(folder, DataFile("documents", "the pictures", (f"{split}/documents",)), self.name).parent
        found = []
        for row in read_object(find(folder, file, self.name)).rows("data"):
            text, answers = row.text("question"), row.texts("answers") if row.get("answers") else None
            kinds = tuple(row.get("question_types") or ()) if answers else ()
            path = str(pictures / row.text("image"))
            found.append(
                Question(row.number("questionId"), text, with_response_format(text, "short"), (path,), answers, kinds)
            )
        return found

    def score(self, question: Question, read: str) -> float:
        return anls(read, question.reference)

    def submission(self, scored: Iterable[Scored]) -> Any:
        return [{"questionId": int(each.question.id), "answer": each.answer.text.strip()} for each in scored]
