"""Settings of an endpoint: URL and model, rate limits, retries and prices."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import inf, isfinite

from llava_fast.errors import EndpointError

OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Endpoint:
    """A chat completions endpoint with OpenAI's API, and the limits of its use.

    base_url              as for the openai client: https://HOST/v1.
    model                 the model name in requests.
    api_key_env           the environment variable with the key, which only OpenAI's own endpoint requires.
    concurrency           maximum number of requests in flight.
    requests_per_minute   limit on attempts, which start at even intervals. None: no limit.
    tokens_per_minute     limit on estimated prompt tokens plus maximum reply tokens. None: no limit.
    timeout               maximum seconds of one attempt.
    attempts              maximum number of attempts per request in a run.
    backoff               seconds before the second attempt, doubled for each further one up to `longest_wait`, with
                          jitter. If the endpoint's Retry-After is longer, it delays all requests.
    price_in, price_out   dollars per million prompt and reply tokens. None: cost is not shown.
    max_cost              dollars per run, after which no request is started. Requires prices.

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
        """Return the key, or "none" if the variable is not set and the endpoint is not OpenAI's.

        Raises EndpointError, whose message does not contain the key.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and self.base_url.rstrip("/") == OPENAI:
            raise EndpointError(f"{OPENAI} needs a key: put it into the environment variable {self.api_key_env}")
        if not key.isascii() or not key.isprintable():
            raise EndpointError(f"the variable {self.api_key_env} holds characters that no key has: set it again")
        return key or "none"

    def cost(self, prompt_tokens: int, reply_tokens: int) -> float | None:
        """Return the cost in dollars, or None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt_tokens * self.price_in + reply_tokens * self.price_out) / 1e6
