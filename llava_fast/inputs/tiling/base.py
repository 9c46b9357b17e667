"""The interface of tiling rules: which views an image is cut into, and which of their rows the decoder sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.rows import VisualRows

if TYPE_CHECKING:
    from llava_fast.inputs.tiling.anyres import VisualGeometry


class Tiling(ABC):
    """A tiling rule other than LLaVA's, which `VisualGeometry` implements itself. One file a rule: a frozen dataclass,
    because views and rows are cached by it.
    """

    @abstractmethod
    def views(self, geometry: VisualGeometry, height: int, width: int) -> tuple[View, ...]:
        """The resizes that make an image's tiles, in the order of the tiles."""

    @abstractmethod
    def rows(self, geometry: VisualGeometry, height: int, width: int) -> VisualRows:
        """The decoder rows of these tiles."""
