"""A cache of the decoder inputs of encoded images and videos, keyed by their content."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class FeatureCache:
    """Rows [rows, C] by prompt.Part.key, at most `max_bytes` of them, evicted least recently used first. For one model
    whose weights do not change.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self._rows: OrderedDict[int, Tensor] = OrderedDict()

    def get(self, key: int) -> Tensor | None:
        rows = self._rows.get(key)
        if rows is None:
            self.misses += 1
        else:
            self.hits += 1
            self._rows.move_to_end(key)
        return rows

    def put(self, key: int, rows: Tensor) -> None:
        """Keep a copy of the rows, unless they alone exceed `max_bytes`."""
        size = rows.numel() * rows.element_size()
        if size > self.max_bytes or key in self._rows:
            return
        self._rows[key] = rows.clone()
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, gone = self._rows.popitem(last=False)
            self.bytes -= gone.numel() * gone.element_size()
