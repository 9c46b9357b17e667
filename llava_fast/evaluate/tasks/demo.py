"""Questions about canvases of handwritten digits that the demo model never saw: a task that needs no file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_fast.demo import KINDS, PHRASINGS, answer, compose, split_scans
from llava_fast.errors import EvaluationError
from llava_fast.evaluate.metrics.text import edit_distance
from llava_fast.evaluate.task import Columns, Question, Scored, Task, mean, ratio

CANVASES = 1000
SEED = 2026
A_PHRASING = 50  # canvases in a row that are asked in the same words


class Demo(Task):
    """The canvases and questions of examples/digits/evaluate.py, condition "whole image"."""

    name = "demo"
    title = "Digits on held-out canvases"
    arguments = f"how many canvases (default {CANVASES})"
    source = "composed from scikit-learn's scans: pip install 'llava_fast[demo]'"
    scorer = "exact answers; digits right is 1 - edits / digits (examples/digits/evaluate.py)"
    max_new_tokens = 8

    def questions(self, folder: Path) -> list[Question]:
        if self.argument and not (self.argument.isdecimal() and int(self.argument)):
            raise EvaluationError(f"demo takes a number of canvases above 0, not {self.argument!r}")
        rng, (_, scans) = np.random.default_rng(SEED), split_scans()
        canvases = [compose(rng, scans) for _ in range(int(self.argument or CANVASES))]
        found = []
        for number, canvas in enumerate(canvases):
            for kind in KINDS:
                text = PHRASINGS[kind][number // A_PHRASING % len(PHRASINGS[kind])]
                categories = (kind,) if canvas.digits or kind != "read" else (kind, "no digit there")
                found.append(
                    Question(
                        f"{number}-{kind}",
                        text,
                        text,
                        (canvas.image,),
                        answer(kind, canvas.digits),
                        categories,
                        cluster=str(number),
                        facts={"digits": len(canvas.digits)},
                    )
                )
        return found

    def score(self, question: Question, read: str) -> float:
        return float(read == question.reference)

    def columns(self, unit: Sequence[Scored]) -> dict[str, float]:
        (scored,) = unit
        question = scored.question
        if question.categories[0] != "read" or not question.facts["digits"]:
            return {"score": scored.score or 0.0, "digits": 0.0, "edits": 0.0}
        edits = edit_distance((scored.read or "").split(), question.reference.split())
        return {"score": scored.score or 0.0, "digits": float(question.facts["digits"]), "edits": float(edits)}

    def metrics(self, columns: Columns, weights: np.ndarray) -> dict[str, float]:
        found = {self.main: 100 * mean(columns["score"], weights)}
        if columns["digits"].any():
            edits = ratio(float(columns["edits"] @ weights), float(columns["digits"] @ weights))
            found["digits right"] = 100 * (1 - edits)
        return found
