"""Label masks: which tokens are supervised, from the character spans of the prompt's single tokenisation."""

from __future__ import annotations

import re

import numpy as np

from llava_fast.errors import RequestError
from llava_fast.inputs.chat.rendering import Segment


def supervised_tokens(offsets: np.ndarray, segments: list[Segment]) -> np.ndarray:
    """bool [S]: the tokens that end inside a supervised segment. This includes a token that begins with the space
    before an answer, but no special tokens without text."""
    ends = np.cumsum([len(segment.text) for segment in segments])
    flags = np.array([segment.supervised for segment in segments] + [False])
    offsets = offsets.reshape(-1, 2)
    segment_of = np.searchsorted(ends, offsets[:, 1], side="left")
    return flags[np.minimum(segment_of, len(segments))] & (offsets[:, 1] > offsets[:, 0])


def offsets_before_expansion(offsets: np.ndarray, is_image: np.ndarray, text: str, token: str) -> np.ndarray:
    """Character offsets of tokens in `text`, given offsets in the text in which each image token is repeated for every
    row of its image. offsets [S, 2]; is_image bool [S]. Image tokens get (0, 0), like all tokens that are not in the
    text.

    Raises RequestError if the numbers of runs of image tokens and of placeholders in the text differ.
    """
    at = np.flatnonzero(is_image)
    first = np.flatnonzero(np.diff(at, prepend=-2) > 1) if len(at) else at
    apart = np.flatnonzero(offsets[at[1:], 0] > offsets[at[:-1], 1]) + 1
    first = np.union1d(first, apart)
    last = np.append(first[1:], len(at)) - 1 if len(first) else first
    placeholders = [len(found[0]) for found in re.finditer(f"(?:{re.escape(token)})+", text)]
    if len(placeholders) != len(first):
        raise RequestError(f"the tokenizer made {len(first)} runs of image tokens from {len(placeholders)} in the text")
    ends = offsets[at[last], 1]
    longer = np.cumsum([0, *(ends - offsets[at[first], 0] - np.array(placeholders, int))])
    shift = longer[np.searchsorted(ends, offsets[:, 0], side="right")]
    return np.where(is_image[:, None], 0, np.where(offsets[:, 1:] > 0, offsets - shift[:, None], 0))
