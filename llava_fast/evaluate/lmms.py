"""lmms-eval's tasks (`lmms:NAME`), run by lmms-eval with this package's model class."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava_fast.errors import EvaluationError, MissingPackageError
from llava_fast.evaluate.model import ModelSpec
from llava_fast.evaluate.results import defined
from llava_fast.evaluate.task import Columns, Task, mean

PREFIX = "lmms:"


class SampleScores(Task):
    """The scores that lmms-eval gives to samples, for comparisons: their mean. Its own metrics may be others."""

    main = "mean score of a sample"

    def metrics(self, columns: Columns, weights: np.ndarray) -> dict[str, float]:
        return {self.main: mean(columns["score"], weights)}


def evaluate(spec: ModelSpec, names: Sequence[str], limit: int | None, batch_size: int) -> dict[str, Any]:
    """Return {"lmms:NAME": results in the format of results.json}. Raises MissingPackageError without lmms-eval, and
    EvaluationError for an option that lmms-eval does not support.
    """
    try:
        from lmms_eval.evaluator import simple_evaluate
    except ImportError:
        raise MissingPackageError("a task of lmms-eval", "lmms-eval", "lmms-eval") from None
    if spec.model_base or spec.quantize or spec.kv_cache:
        raise EvaluationError("lmms: tasks take no --model-base, --quantize or --kv-cache: convert the model first")
    options = {"pretrained": spec.path, "device": spec.device, "dtype": spec.dtype, "chat_template": spec.chat_template}
    if "," in spec.path or "=" in spec.path:
        raise EvaluationError(f"lmms-eval cannot be given the path {spec.path!r}: it may hold no comma and no '='")
    arguments = ",".join(f"{name}={value}" for name, value in options.items() if value)
    tasks = [name.removeprefix(PREFIX) for name in names]
    made = simple_evaluate(
        model="llava_fast", model_args=arguments, tasks=tasks, limit=limit, batch_size=batch_size, bootstrap_iters=0
    )
    if made is None:
        raise EvaluationError("lmms-eval returned no results (another rank holds them)")
    return {f"{PREFIX}{name}": _result(name, made) for name in made["results"]}


def _result(name: str, made: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {
        key.removesuffix(",none"): defined(value)
        for key, value in made["results"][name].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in key
    }
    answers = [_row(sample, metrics) for sample in made.get("samples", {}).get(name, [])]
    return {
        "title": f"lmms-eval: {name}",
        "main": next(iter(metrics), ""),
        "unit": "points",
        "judged": False,
        "metrics": metrics,
        "intervals": {},
        "categories": {},
        "category_intervals": {},
        "category_units": {},
        "questions": len(answers),
        "units": len(answers),
        "unreadable": 0,
        "errors": 0,
        "cut_off": 0,
        "scorer": "lmms-eval",
        "source": "https://github.com/EvolvingLMMs-Lab/lmms-eval",
        "folder": "",
        "answers": answers,
    }


def _row(sample: Mapping[str, Any], metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """Convert a sample of lmms-eval to a row. Its score is the first numeric metric."""
    scores = (sample[name] for name in metrics if isinstance(sample.get(name), (int, float)))
    filtered = sample.get("filtered_resps") or [""]
    target = sample.get("target")
    question = str(sample.get("input", ""))
    return {
        "id": str(sample.get("doc_id")),
        "question": question,
        "prompt": question,
        "images": [],
        "reference": _json(target),
        "answer": str(filtered[0]),
        "read": str(filtered[0]),
        "score": next((defined(score) for score in scores), None),
        "categories": [],
        "tokens": 0,
        "finish": "stop",
        "pictures": [],
    }


def _json(target: Any) -> Any:
    """Return a sample's target, or its text where JSON cannot hold it."""
    try:
        json.dumps(target, allow_nan=False)
    except (TypeError, ValueError):
        return str(target)
    return target
