"""Preprocessing of a decoded photograph to the tiles of a vision tower. Decoding the file is not included.

llava_fast produces uint8 tiles and folds normalisation into the tower's weights. transformers' Pillow processor
produces normalised float32. Therefore there are two cases: transformers without rescaling and normalisation, which is
the same work, and transformers with its defaults. hf-compile is omitted because nothing can be compiled here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from benchmarks import checks
from benchmarks.case import Case, Provider, Settings
from benchmarks.floors import preprocess_floor
from benchmarks.inputs import ROTATED, photographs
from benchmarks.subject import Subject


def cases(subject: Subject, settings: Settings) -> Iterator[Case]:
    batches = [photographs(settings, number) for number in range(ROTATED)]
    processor = dataclasses.replace(subject.processor, threads=settings.threads)
    theirs = subject.hf_processor.image_processor
    mean, std = (np.array(value, np.float32)[:, None, None] for value in (theirs.image_mean, theirs.image_std))

    def ours(number: int) -> list[np.ndarray]:
        return [processor.tiles(image) for image in batches[number % ROTATED]]

    def hf(number: int, **options):
        return theirs(batches[number % ROTATED], return_tensors="np", **options)["pixel_values"]

    def hf_uint8(number: int):
        return hf(number, do_rescale=False, do_normalize=False)

    def denormalised(values: np.ndarray) -> np.ndarray:
        return np.rint((joined(values) * std + mean) * 255).astype(np.int16)

    tiles = np.concatenate(ours(0))
    width, height = settings.image_size
    floor = preprocess_floor(settings.batch_size * width * height, tiles.size)
    share = len(tiles) // settings.batch_size
    for name, run, result in (("no normalising", hf_uint8, joined), ("transformers normalises", hf, denormalised)):
        every = [Provider("llava_fast", ours, np.concatenate), Provider("hf-eager", run, result)]
        yield Case(
            suite="preprocess",
            model=subject.label,
            real_width=subject.real_width,
            label=f"{settings.batch_size} of {width}x{height} to {share} tiles, {name}",
            providers=[provider for provider in every if provider.backend in settings.backends],
            check=checks.equal_pixels,
            floor=floor,
            items=settings.batch_size,
            unit="images",
        )


def joined(values: np.ndarray) -> np.ndarray:
    """[images, tiles, 3, H, W] or [images, 3, H, W] to [all tiles, 3, H, W]. All images have equally many tiles."""
    return values.reshape(-1, *values.shape[-3:])
