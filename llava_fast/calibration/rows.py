"""Calibration samples as rows of the decoder's input, images among them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llava_fast.errors import DataError, LlavaFastError
from llava_fast.generation.llava import Llava
from llava_fast.train.data.samples import Source, read_sources

logger = logging.getLogger("llava_fast.quantised")
SAMPLES = 256
"""Samples that are drawn unless a number is given."""


@torch.no_grad()
def calibration_rows(
    model: Llava,
    data: str | Path,
    images: str | Path | None,
    samples: int | None,
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> list[Tensor]:
    """inputs_embeds [rows, width] of each sample. Samples that cannot be read or are too long are logged, and others
    taken. Raises DataError if there are fewer than asked for, or none has an image or a video."""
    table = read_sources([Source(path=str(data), images="" if images is None else str(images))])
    wanted = min(samples or SAMPLES, len(table)) if samples is None else samples
    if wanted > len(table):
        raise DataError(f"{data} has {len(table)} samples, fewer than the {wanted} asked for")
    left = iter(np.random.default_rng(seed).permutation(len(table)).tolist())
    found: list[Tensor] = []
    visual, problems = 0, []
    for _ in progress(range(wanted)):
        for number in left:
            try:
                batch = model.prepare([table[number].request], labels=True)
            except LlavaFastError as problem:
                problems.append(str(problem))
                continue
            visual += batch.plan.tiles > 0
            found.append(model.routed(batch).embeds)
            break
    if problems:
        shown = "; ".join(problems[:3]) + "; ..." * (len(problems) > 3)
        logger.warning("%d samples cannot calibrate, others are taken: %s", len(problems), shown)
    if len(found) < wanted and (samples is not None or not found):
        raise DataError(
            f"only {len(found)} of {data}'s samples can calibrate, and {wanted} are asked for; the first problem: "
            f"{problems[0]}"
        )
    if not visual:
        raise DataError(
            f"{data}: none of the {len(found)} samples has an image, so rows of images would be rounded blindly: "
            "calibrate with the kind of data that the model was trained on"
        )
    logger.info("%d samples calibrate, %d with images, %d rows", len(found), visual, sum(map(len, found)))
    return found
