"""The digits demo: images ("canvases") of handwritten digits, and the questions that the demo model answers."""

from llava_fast.demo.canvas import Canvas, compose, split_scans
from llava_fast.demo.questions import KINDS, PHRASINGS, answer, ask

__all__ = ["KINDS", "PHRASINGS", "Canvas", "answer", "ask", "compose", "split_scans"]
