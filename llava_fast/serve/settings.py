"""What a server may do and how much of it: every limit in one place."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

from llava_fast.errors import ServeError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server works. `llava-fast serve --help` says the same of its options.

    model_name          the name that clients ask for.
    api_keys            keys of which a client must send one (none: everybody is served).
    max_running         most answers made at once.
    max_waiting         most answers that may wait beyond those; more are refused with 429.
    deadline            seconds from a request's arrival to its end; then it ends with an error.
    drain               seconds that running answers may still take after SIGTERM.
    workers             threads that read images and tokenise.
    max_body_bytes      largest request body.
    max_prompt_tokens   longest prompt, visual tokens included (None: the model's context).
    max_answer_tokens   longest answer, and the default where a request names none (None: the model's context).
    max_choices         most answers to one request (`n`).

    Raises ServeError for a value out of range.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    max_running: int = 32
    max_waiting: int = 128
    deadline: float = 600.0
    drain: float = 30.0
    workers: int = 2
    max_body_bytes: int = 64 << 20
    max_prompt_tokens: int | None = None
    max_answer_tokens: int | None = None
    max_choices: int = 8

    def __post_init__(self) -> None:
        for name in (
            *("max_running", "max_waiting", "workers", "max_body_bytes"),
            *("max_prompt_tokens", "max_answer_tokens", "max_choices"),
        ):
            value, least = getattr(self, name), 0 if name == "max_waiting" else 1
            optional = name in ("max_prompt_tokens", "max_answer_tokens")
            if not (value is None and optional) and (not isinstance(value, Integral) or value < least):
                raise ServeError(f"{name} must be a whole number, {least} or more, got {value!r}")
        for name in ("deadline", "drain"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 < value < float("inf"):
                raise ServeError(f"{name} must be a number of seconds above 0, got {value!r}")
        if not all(key.strip() and key.isascii() for key in self.api_keys):
            raise ServeError("an API key must be ASCII text that is not empty")
