"""The inputs of the suites: photographs, prompts, and the tensors that each side prepares from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.case import Settings
from benchmarks.floors import Sizes
from benchmarks.subject import Subject
from llava_fast.generation.prompt import Part, Prompt
from llava_fast.inputs.plan.columns import MODALITY_TEXT
from llava_fast.inputs.plan.plan import TextPiece
from llava_fast.models.batch import Batch

PROMPT = "USER: <image>\nWhat is shown in this picture? ASSISTANT:"
ROTATED = 3
"""The number of different inputs, between which the timed calls rotate."""


def photographs(settings: Settings, rotation: int = 0) -> list[Image.Image]:
    """Return a batch of decoded photographs: scikit-learn's china.jpg, shifted differently for each image, or smooth
    seeded noise if scikit-learn is not installed."""
    width, height = settings.image_size
    pixels = np.asarray(_photograph().resize((width, height), Image.Resampling.LANCZOS))
    shifts = (17 * (rotation * settings.batch_size + number) for number in range(settings.batch_size))
    return [Image.fromarray(np.ascontiguousarray(np.roll(pixels, shift, axis=(0, 1)))) for shift in shifts]


def requests(settings: Settings, rotation: int = 0) -> list[dict]:
    """Return requests for llava_fast, each with one photograph and the prompt."""
    return [{"prompt": PROMPT, "images": [image]} for image in photographs(settings, rotation)]


def hf_inputs(subject: Subject, settings: Settings, rotation: int = 0) -> dict[str, Any]:
    """Return the inputs of transformers' model for the same batch, on its device and in its dtype."""
    inputs = hf_process(subject, photographs(settings, rotation))
    inputs["pixel_values"] = inputs["pixel_values"].to(subject.dtype)
    return {name: value.to(subject.device) for name, value in inputs.items()}


def hf_process(subject: Subject, images: list[Image.Image]) -> dict[str, Any]:
    return dict(subject.hf_processor(images=images, text=[PROMPT] * len(images), return_tensors="pt"))


@dataclass(frozen=True)
class Prepared:
    """A batch in the input format of each side."""

    ours: Batch
    hf: dict[str, Any]


def prepared(subject: Subject, settings: Settings) -> list[Prepared]:
    """`ROTATED` different batches."""
    return [
        Prepared(subject.ours.prepare(requests(settings, number)), hf_inputs(subject, settings, number))
        for number in range(ROTATED)
    ]


def sizes(batch: Batch, logits: int | None = None) -> Sizes:
    """Return the sizes for the lower bounds. `logits` is the number of rows with logits (default: one per sequence)."""
    plan = batch.plan
    kept = int(plan.sections["kept"][1][0])
    return Sizes(plan.tiles, kept, plan.lengths, logits or len(plan.lengths))


def describe(settings: Settings, batch: Batch) -> str:
    """ "1 image of 1024x768, 2391 rows, 2340 of them visual"."""
    plan = batch.plan
    visual = int((plan.column("modality") > MODALITY_TEXT).sum())
    width, height = settings.image_size
    images = "1 image" if settings.batch_size == 1 else f"{settings.batch_size} images"
    return f"{images} of {width}x{height}, {sum(plan.lengths)} rows, {visual} visual"


def inference(work):
    """`work` under torch.inference_mode."""

    def run(number: int):
        with torch.inference_mode():
            return work(number)

    return run


def text_prompt(ids: Sequence[int]) -> Prompt:
    """Return llava_fast's prompt for given token ids."""
    return Prompt([Part(TextPiece(np.asarray(ids, np.int32)))])


def _photograph() -> Image.Image:
    try:
        from sklearn.datasets import load_sample_image
    except ImportError:
        noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((640, 427), Image.Resampling.BICUBIC)
    return Image.fromarray(load_sample_image("china.jpg"))
