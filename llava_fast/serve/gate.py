"""Checks of every request before its body is read: host name, API key, type, size and time of the body."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import urllib.parse
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_fast.serve.errors import ApiError
from llava_fast.serve.settings import Settings

OPEN = ("/health", "/", "/static/")  # need no key: health, and the page's files


class Gate:
    """ASGI middleware. All keys are compared, in constant time, so that timing reveals nothing. count: called with each
    request's path and status."""

    def __init__(self, app: ASGIApp, settings: Settings, count: Callable[[str, int], None]) -> None:
        self.app, self.settings, self.count = app, settings, count
        self.held = 0  # bytes of the bodies of all requests in progress

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
            if scope["path"] != OPEN[0]:
                self._check_host(headers.get(b"host", b""))
            if scope["path"] not in OPEN and not scope["path"].startswith(OPEN[-1]):
                self._check_key(headers.get(b"authorization", b""))
            if scope["method"] == "POST":
                self._check_type(headers.get(b"content-type", b""))
            self._check_size(headers.get(b"content-length", b"0"))
        except ApiError as error:
            await error.response(scope, receive, counting)
            return
        received, whole = 0, False
        now = asyncio.get_running_loop().time
        ends = now() + self.settings.body_seconds

        async def counted() -> Message:
            nonlocal received, whole
            try:
                message = await (receive() if whole else asyncio.wait_for(receive(), ends - now()))
            except asyncio.TimeoutError:
                raise ApiError(408, f"the body did not arrive within {self.settings.body_seconds} seconds") from None
            whole = whole or not message.get("more_body", False)
            size = len(message.get("body", b""))
            received += size
            self.held += size
            if received > self.settings.max_body_bytes:
                raise self._too_large()
            if self.held > self.settings.max_held_bytes:
                raise ApiError(
                    429,
                    f"the server already has bodies of {self.settings.max_held_bytes} bytes: try again later",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            return message

        try:
            await self.app(scope, counted, counting)
        finally:
            self.held -= received

    def _check_host(self, sent: bytes) -> None:
        """Raise ApiError for a host name that is not this server's, against DNS rebinding: a web page whose name
        resolves to this server would count as the server's own page. IP addresses are safe."""
        try:
            host = (urllib.parse.urlsplit("//" + sent.decode("ascii")).hostname or "").rstrip(".")
        except ValueError:
            host = "?"
        if host in ("", "localhost") or _is_address(host):
            return
        if any(each == "*" or host == each.lower() for each in self.settings.host_names):
            return
        raise ApiError(403, "unknown host name: start the server with --host-name NAME", code="unknown_host")

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

    def _check_type(self, sent: bytes) -> None:
        """Raise ApiError for a body that is not sent as JSON, against forged requests (CSRF): a page of another origin
        may send only plain types and none without asking first (CORS)."""
        if sent.partition(b";")[0].strip().lower() != b"application/json":
            raise ApiError(415, "send the body as JSON, with the header 'Content-Type: application/json'")

    def _check_size(self, length: bytes) -> None:
        if length.isdigit() and int(length[:20]) > self.settings.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request's body is larger than {self.settings.max_body_bytes} bytes",
            code="body_too_large",
        )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
