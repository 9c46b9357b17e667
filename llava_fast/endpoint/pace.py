"""Rate limiter: requests start at even intervals, so that no minute exceeds the limit."""

from __future__ import annotations

import asyncio


class Pace:
    """Assigns start times in the order of arrival. After a turn of `amount`, the next is amount / per_minute minutes
    later.

    per_minute  None: no limit, but `hold` still works.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 60 / per_minute if per_minute else 0.0
        self._free = 0.0

    def turn(self, amount: float = 1) -> float:
        """Take a turn and return the seconds until it starts."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._free)
        self._free = start + amount * self._seconds
        return start - now

    def hold(self, seconds: float) -> None:
        """Delay all further turns by at least `seconds` from now."""
        self._free = max(self._free, asyncio.get_running_loop().time() + seconds)
