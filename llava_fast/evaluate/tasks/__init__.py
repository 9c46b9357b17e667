"""The tasks by name. A task is a class in a file of this folder and a line here."""

from __future__ import annotations

from llava_fast.errors import EvaluationError
from llava_fast.evaluate.task import Task
from llava_fast.models.registry import Registry

TASKS: Registry[Task] = Registry(
    __name__,
    {
        "demo": "demo:Demo",
        "llava": "llava_json:LlavaJson",
        "vqav2": "vqa:Vqav2",
        "gqa": "short:Gqa",
        "vizwiz": "vqa:VizWiz",
        "textvqa": "vqa:TextVqa",
        "textvqa-ocr": "vqa:TextVqaOcr",
        "scienceqa": "choices:ScienceQa",
        "pope": "yes_no:Pope",
        "mme": "yes_no:Mme",
        "mmbench": "choices:MmBench",
        "seed": "choices:Seed",
        "ai2d": "choices:Ai2d",
        "chartqa": "short:ChartQa",
        "docvqa": "short:DocVqa",
        "llava-bench": "open_ended:BenchInTheWild",
        "llava-bench-coco": "open_ended:BenchCoco",
        "llava-bench-wilder": "open_ended:BenchWilder",
        "mm-vet": "open_ended:MmVet",
    },
)


def task_of(name: str) -> Task:
    """The task that "name" or "name:argument" stands for. Raises EvaluationError for an unknown one."""
    known, _, argument = name.partition(":")
    if known not in TASKS:
        raise EvaluationError(
            f"unknown task {known!r}: use one of {', '.join(TASKS)}, or lmms:NAME for one of lmms-eval"
        )
    return TASKS[known](argument)
