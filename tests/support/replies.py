"""What stands in for an endpoint in tests that need none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llava_fast.endpoint import Ask, Reply, Request
from tests.support.scripted_endpoint import completion


def reply(text: str | None, finish: str = "stop", refusal: str | None = None) -> Reply:
    return Reply.read(completion(text, finish, refusal))


def asker(answer: Callable[[Request], Reply | str | None]) -> Ask:
    """Asks a function: a text is a whole reply, None one that failed."""

    def ask(requests: Sequence[Request], title: str) -> list[Reply | None]:
        given = [answer(each) for each in requests]
        return [reply(each) if isinstance(each, str) else each for each in given]

    return ask


def asked_text(request: Request) -> str:
    """The last message of a request."""
    return request.messages[-1]["content"]
