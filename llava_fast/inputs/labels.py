"""Which tokens carry a label, from the spans of the one tokenisation."""

from __future__ import annotations

import numpy as np

from llava_fast.inputs.chat.rendering import Segment


def supervised_tokens(offsets: np.ndarray, segments: list[Segment]) -> np.ndarray:
    """Which tokens carry a label: those that end inside a supervised segment. A token that begins with the space
    before an answer ends inside it, so it counts; special tokens without text do not."""
    ends = np.cumsum([len(segment.text) for segment in segments])
    flags = np.array([segment.supervised for segment in segments] + [False])
    offsets = offsets.reshape(-1, 2)
    segment_of = np.searchsorted(ends, offsets[:, 1], side="left")
    return flags[np.minimum(segment_of, len(segments))] & (offsets[:, 1] > offsets[:, 0])
