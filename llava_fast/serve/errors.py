"""Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from llava_fast.errors import CacheFullError, ImageError, PromptTooLongError, RequestError
from llava_fast.storage.files import place_of

logger = logging.getLogger("llava_fast.serve")

# OpenAI's error type of each status; other statuses below 500 are "invalid_request_error".
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A response with an error body. param: the invalid field; code: a machine-readable code."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def check_wanted(gone: threading.Event) -> None:
    """Raise ApiError if nobody waits for the response any more. Work in the pool calls this between its parts."""
    if gone.is_set():
        raise ApiError(499, "the client closed the connection")  # never sent


def api_error(error: BaseException) -> ApiError:
    """The response to an error. Errors of the request are described in full; internal errors are logged, and the client
    gets only a general message."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, (CacheFullError, PromptTooLongError)):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, (RequestError, ImageError)):
        return ApiError(400, str(error))
    if isinstance(error, asyncio.TimeoutError):
        return ApiError(504, "the answer took longer than this server allows", code="timeout")
    logger.error("a request failed: %r", error, exc_info=error)
    return ApiError(500, "internal error; see the server's log", code="internal_error")


def handle_errors(app: FastAPI) -> None:
    """Return every error of the app in OpenAI's format."""

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return api_error(error).response

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid(error.errors(), error.body).response

    @app.exception_handler(Exception)
    async def _any(request: Request, error: Exception) -> JSONResponse:
        return api_error(error).response


def invalid(errors: Sequence[Any], body: Any) -> ApiError:
    """One of pydantic's errors as one sentence. Where a field may have several types there is an error for each, and
    the deepest belongs to the type that was meant."""
    if body is None:
        return ApiError(400, "the body is empty or null: send a JSON object")
    first = max(errors, key=_depth)
    where = _place(first, body)
    same = [error["msg"] for error in errors if _place(error, body) == where and _depth(error) == _depth(first)]
    message = " or ".join(dict.fromkeys(message.removeprefix("Value error, ") for message in same))
    return ApiError(400, f"{where}: {message}" if where else message, param=where or None)


def _place(error: Any, body: Any) -> str:
    return place_of(error["loc"][1:], body, missing=error["type"] == "missing")  # without "body"


def _depth(error: Any) -> tuple[int, bool]:
    """More for an error that says more than that the type is another."""
    return len(error["loc"]), not error["type"].endswith("_type")
