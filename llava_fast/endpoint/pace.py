"""Requests begin evenly over time, so that no minute has more than the limit."""

from __future__ import annotations

import asyncio


class Pace:
    """Turns in the order of arrival: after one of `amount` the next is amount / per_minute minutes later.

    per_minute  None: no limit, but `hold` still works.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 60 / per_minute if per_minute else 0.0
        self._free = 0.0

    def turn(self, amount: float = 1) -> float:
        """Take a turn; returns the seconds to wait for it."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._free)
        self._free = start + amount * self._seconds
        return start - now

    def hold(self, seconds: float) -> None:
        """Turns that are not taken yet come no sooner than in `seconds`."""
        self._free = max(self._free, asyncio.get_running_loop().time() + seconds)
