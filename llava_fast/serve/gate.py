"""What every request passes before its body is read: the API key and the body's size."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_fast.serve.errors import ApiError
from llava_fast.serve.settings import Settings

OPEN = ("/health", "/")  # answered without a key


class Gate:
    """ASGI middleware. Keys are compared in constant time, and all of them, so that time tells nothing."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            if scope["path"] not in OPEN:
                self._check_key(headers.get(b"authorization", b""))
            self._check_size(headers.get(b"content-length", b"0"))
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.settings.max_body_bytes:
                raise self._too_large()
            return message

        await self.app(scope, counted, send)

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
