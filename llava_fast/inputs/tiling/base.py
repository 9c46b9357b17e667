"""The interface of tiling rules: an image's views, and the decoder rows of its tiles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from llava_fast.inputs.pictures.view import View
from llava_fast.inputs.tiling.rows import VisualRows

if TYPE_CHECKING:
    from llava_fast.inputs.tiling.anyres import VisualGeometry


class Tiling(ABC):
    """A tiling rule other than LLaVA's, which `VisualGeometry` implements. Each rule is one file with a frozen
    dataclass, which is the key of cached views and rows.
    """

    @abstractmethod
    def views(self, geometry: VisualGeometry, height: int, width: int) -> tuple[View, ...]:
        """The resizes that make an image's tiles, in the order of the tiles."""

    @abstractmethod
    def rows(self, geometry: VisualGeometry, height: int, width: int) -> VisualRows:
        """The decoder rows of these tiles."""
