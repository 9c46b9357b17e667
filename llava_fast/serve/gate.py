"""What every request passes before its body is read: the API key and the body's size."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_fast.serve.errors import ApiError
from llava_fast.serve.settings import Settings

OPEN = ("/health", "/")  # answered without a key


class Gate:
    """ASGI middleware. Keys are compared in constant time, and all of them, so that time tells nothing. `count` is told
    of each request's path and status."""

    def __init__(self, app: ASGIApp, settings: Settings, count: Callable[[str, int], None]) -> None:
        self.app, self.settings, self.count = app, settings, count
        self.held = 0  # bytes of the bodies of all requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"])
            await send(message)

        try:
            if scope["path"] not in OPEN:
                self._check_key(headers.get(b"authorization", b""))
            self._check_size(headers.get(b"content-length", b"0"))
        except ApiError as error:
            await error.response(scope, receive, counting)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self.held += size
            if received > self.settings.max_body_bytes:
                raise self._too_large()
            if self.held > self.settings.max_held_bytes:
                raise ApiError(
                    429,
                    f"the server holds bodies of {self.settings.max_held_bytes} bytes already: try again later",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            return message

        try:
            await self.app(scope, counted, counting)
        finally:
            self.held -= received

    def _check_key(self, sent: bytes) -> None:
        keys = self.settings.api_keys
        if not keys:
            return
        scheme, _, key = sent.partition(b" ")
        fits = [hmac.compare_digest(key.strip(), each.encode()) for each in keys]
        if scheme.lower() != b"bearer" or not any(fits):
            raise ApiError(
                401,
                "send one of this server's API keys as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_size(self, length: bytes) -> None:
        if length.isdigit() and int(length[:20]) > self.settings.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request's body is larger than {self.settings.max_body_bytes} bytes",
            code="body_too_large",
        )
