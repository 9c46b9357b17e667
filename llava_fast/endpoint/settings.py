"""Which endpoint is asked, how fast, how persistently and at what price."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import inf, isfinite

from llava_fast.errors import EndpointError

OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Endpoint:
    """An endpoint that speaks OpenAI's chat completions, and how it is to be used.

    base_url              as of the openai client: https://HOST/v1.
    model                 the name that requests carry.
    api_key_env           the environment variable that holds the key; only OpenAI's own endpoint must have one.
    concurrency           most requests in flight.
    requests_per_minute   requests begin evenly, at most this many a minute (attempts count). None: no limit.
    tokens_per_minute     as requests_per_minute, of estimated prompt tokens and the most tokens of the reply.
    timeout               seconds that one attempt may take from first to last byte.
    attempts              how often a request is tried before it is given up for this run.
    backoff               seconds before the second attempt; doubled for each further one, up to `longest_wait`, with
                          jitter. The endpoint's Retry-After, where it is longer, holds back all requests.
    price_in, price_out   dollars per million tokens of prompt and reply. None: cost is not shown.
    max_cost              dollars: no request begins after this run has cost them. Needs prices.

    Raises EndpointError for a value out of range.
    """

    model: str
    base_url: str = OPENAI
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 1.0
    longest_wait: float = 60.0
    price_in: float | None = None
    price_out: float | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise EndpointError("the endpoint's model has no name: give the one that its /v1/models lists")
        if not self.base_url.startswith(("http://", "https://")):
            raise EndpointError(f"the base URL {self.base_url!r} must begin with http:// or https://")
        for name, least in (("concurrency", 1), ("attempts", 1), ("backoff", 0), ("longest_wait", 0)):
            if not least <= getattr(self, name) < inf:
                raise EndpointError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        for name in ("requests_per_minute", "tokens_per_minute", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise EndpointError(f"{name} is {value}: it must be more than 0")
        for name in ("price_in", "price_out", "max_cost"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and isfinite(value)):
                raise EndpointError(f"{name} is {value}: it must be 0 or more dollars")
        if (self.price_in is None) != (self.price_out is None):
            raise EndpointError("one price is missing: give both, per million tokens of prompt and of reply")
        if self.max_cost is not None and self.price_in is None:
            raise EndpointError("a limit on the cost needs both prices, per million tokens of prompt and of reply")

    def api_key(self) -> str:
        """The key; "none" for an endpoint that is not OpenAI's where the variable is not set.

        Raises EndpointError, without the key in its message.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and self.base_url.rstrip("/") == OPENAI:
            raise EndpointError(f"{OPENAI} needs a key: put it into the environment variable {self.api_key_env}")
        if not key.isascii() or not key.isprintable():
            raise EndpointError(f"the variable {self.api_key_env} holds characters that no key has: set it again")
        return key or "none"

    def cost(self, prompt_tokens: int, reply_tokens: int) -> float | None:
        """Dollars, or None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt_tokens * self.price_in + reply_tokens * self.price_out) / 1e6
