"""Cost estimates before requests are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava_fast.endpoint.replies import Store
from llava_fast.endpoint.requests import Request
from llava_fast.endpoint.settings import Endpoint


@dataclass(frozen=True)
class Estimate:
    """The number of requests without a reply, their tokens and cost. Prompt tokens are estimated from characters.
    Reply tokens are the allowed maximum, so the cost is close to an upper bound."""

    requests: int
    kept: int
    prompt_tokens: int
    reply_tokens: int
    dollars: float | None

    def __str__(self) -> str:
        if not self.requests:
            return f"all {self.kept:,} replies are there already: nothing is asked"
        kept = f" ({self.kept:,} replies are there already)" if self.kept else ""
        cost = "cost unknown: give prices" if self.dollars is None else f"about ${self.dollars:,.2f} or less"
        return (
            f"{self.requests:,} requests to ask{kept}, about {self.prompt_tokens:,} prompt tokens and at most "
            f"{self.reply_tokens:,} reply tokens: {cost}"
        )


def estimate(requests: Sequence[Request], endpoint: Endpoint, store: Store | None = None) -> Estimate:
    """Count the requests that `ask_all` would send. Equal requests count once."""
    kept = prompt = reply = 0
    seen = set()
    for request in requests:
        key = request.key(endpoint.model)
        if key in seen:
            continue
        seen.add(key)
        if store is not None and key in store:
            kept += 1
            continue
        tokens = request.tokens()
        prompt, reply = prompt + tokens[0], reply + tokens[1]
    return Estimate(len(seen) - kept, kept, prompt, reply, endpoint.cost(prompt, reply))
