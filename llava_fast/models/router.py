"""SliME's text-guided router: of an image's optional rows, those stay that are most like the text.

A row's score is the sum over the text's tokens of the cosine similarity of their embeddings with it. After a softmax,
rows stay in descending order while their probabilities add up to at most `top_p`, plus one; all in float32.

Sources: Zhang et al. 2024 (SliME); yfzhang114/SliME 5c89ec9 multimodal_resampler/builder.py (TextGuidedSampler).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NOISE = 0.1
"""Deviation of the noise that is added to scores in training."""
_EPS = 1e-8  # of torch's cosine_similarity


@dataclass(frozen=True)
class RouterConfig:
    """top_p: see above, below 1. temperature: scores are divided by it."""

    top_p: float
    temperature: float = 1.0


def scores(rows_RC: Tensor, image_R: Tensor, text_ILC: Tensor, is_text_IL: Tensor) -> Tensor:
    """float32 [R]: the score of each row with the text of its image, I images with L tokens at most.

    The sum over tokens is taken before the product with the row, so no [R, L, C] or [R, L] is made.
    """
    text = F.normalize(text_ILC.float(), dim=-1, eps=_EPS)
    summed_IC = (text * is_text_IL[..., None]).sum(1)
    rows = F.normalize(rows_RC.float(), dim=-1, eps=_EPS)
    return (rows * summed_IC[image_R]).sum(-1)


def stays(scores_R: np.ndarray, image_R: np.ndarray, config: RouterConfig) -> np.ndarray:
    """bool [R]: the rows that stay. image_R: the image of each row, in ascending order."""
    found = np.zeros(len(scores_R), bool)
    starts = np.flatnonzero(np.diff(image_R, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(image_R)], strict=True):
        probability = (torch.from_numpy(scores_R[start:end].astype(np.float32)) / config.temperature).softmax(0)
        ordered, order = probability.sort(descending=True, stable=True)
        most = int((ordered.cumsum(0) <= config.top_p).sum()) + 1
        found[start + order[:most].numpy()] = True
    return found
