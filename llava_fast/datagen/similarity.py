"""Which texts or pictures are alike: TF-IDF of words, or features of a model's own tower."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from llava_fast.errors import MissingPackageError

_IMAGES_AT_ONCE = 8


def text_vectors(texts: Sequence[str]) -> Any:
    """A sparse row of length 1 a text: TF-IDF of its words and pairs of words, English stop words left out."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        return TfidfVectorizer(stop_words="english", ngram_range=(1, 2), sublinear_tf=True).fit_transform(texts)
    except ValueError:  # no word is left
        return np.zeros((len(texts), 1), np.float32)


def image_vectors(model: Any, images: Sequence[Any]) -> np.ndarray:
    """float32 [images, width], rows of length 1: the mean over an image's rows of what the model's tower and projector
    give for it. images: paths, or whatever a request may hold.

    Raises ImageError, naming the image's number, for one that cannot be read.
    """
    import torch
    from tqdm import tqdm

    from llava_fast.generation.prompt import read_prompt
    from llava_fast.models.batch import Batch

    processor = model.own_processor
    vectors: list[np.ndarray] = []
    for start in tqdm(range(0, len(images), _IMAGES_AT_ONCE), desc="image features", unit="batch"):
        parts = []
        for number, image in enumerate(images[start : start + _IMAGES_AT_ONCE], start=start):
            messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
            prompt = read_prompt(processor, {"messages": messages, "images": [image]}, number)
            parts.append(next(part for part in prompt.parts if part.is_visual))
        tiles = [cut for part in parts for cut in part.tiles]
        batch = Batch.from_prepared(processor.assemble([[part.piece] for part in parts], tiles), model.device)
        with torch.inference_mode():
            rows = model.inputs_embeds(batch).split(batch.plan.lengths)
        vectors += [each.float().mean(0).cpu().numpy() for each in rows]
    stacked = np.stack(vectors)
    return stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-12)


def nearest(vectors: Any, count: int, groups: Sequence[Hashable]) -> list[list[int]]:
    """For each row the numbers of up to `count` others, nearest first by cosine, each of another group than its own and
    than one another. Rows without anything in common (cosine 0) are left out."""
    check_sklearn()
    from sklearn.neighbors import NearestNeighbors

    total = len(groups)
    searched = min(total, 8 * count + 8)
    if searched < total:
        search = NearestNeighbors(n_neighbors=searched, metric="cosine", algorithm="brute").fit(vectors)
        distances, found = search.kneighbors()
    else:
        distances, found = _all(vectors, total)
    chosen = []
    for number in range(total):
        seen: set[Hashable] = {groups[number]}
        near: list[int] = []
        for distance, other in zip(distances[number], found[number], strict=True):
            if len(near) < count and distance < 1 - 1e-9 and groups[other] not in seen:
                seen.add(groups[other])
                near.append(int(other))
        chosen.append(near)
    return chosen


def _all(vectors: Any, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Every row's distances to all others, for few rows."""
    from sklearn.metrics.pairwise import cosine_distances

    distances = cosine_distances(vectors)
    np.fill_diagonal(distances, np.inf)
    order = np.argsort(distances, axis=1, kind="stable")[:, : total - 1]
    return np.take_along_axis(distances, order, 1), order


def check_sklearn() -> None:
    """Raises MissingPackageError."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise MissingPackageError("finding what is alike", "scikit-learn", "data") from None
