"""Parsing of JSON request bodies: large bodies in a thread, with a limit on the number of values and parts.

The parser holds the GIL, so a thread alone does not keep other requests responsive. The limit on the number of values
bounds how long they wait. A data URI of any length is one value.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from llava_fast.serve.errors import ApiError

SMALL = 64 << 10  # bytes up to which a body is parsed in the event loop
MOST_VALUES = 1 << 20
MOST_PARTS = 8192  # in all messages together


def parse(body: bytes) -> Any:
    """Return the parsed body. Raises ApiError if it is not JSON, or has too many values or message parts."""
    if len(body) > SMALL and sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ApiError(400, f"the body has more than {MOST_VALUES} values", code="body_too_large")
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    contents = (
        [each.get("content") for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    )
    if (parts := sum(len(each) for each in contents if isinstance(each, list))) > MOST_PARTS:
        raise ApiError(400, f"the messages have {parts} parts and a request takes {MOST_PARTS}", "messages")
    return value


class JsonRequest(Request):
    """A request whose body is parsed by `parse`, in a thread unless it is small."""

    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= SMALL:
            return parse(body)
        return await asyncio.get_running_loop().run_in_executor(_thread, parse, body)


class JsonRoute(APIRoute):
    """A route whose handler receives a JsonRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handled(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handled


_thread = ThreadPoolExecutor(1, "llava-fast-parse")
