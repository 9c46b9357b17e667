"""The HTTP interface: OpenAI's endpoints, the health check, and the static files of the web page."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.types import Receive, Scope, Send

from llava_fast.serve.answers import Answer, ChatAnswer, CompletionAnswer
from llava_fast.serve.bodies import JsonRoute
from llava_fast.serve.engine import Step
from llava_fast.serve.errors import api_error, check_wanted, handle_errors
from llava_fast.serve.gate import Gate
from llava_fast.serve.plan import PromptPlan
from llava_fast.serve.protocol import ChatRequest, CompletionRequest, PlanRequest
from llava_fast.serve.service import Body, Service
from llava_fast.version import __version__

T = TypeVar("T")
SLOW = 5.0
PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Headers of the page: no external or inline resources, no embedding in frames. Images and videos are blob: URLs of
the user's own files."""


def create_app(service: Service) -> FastAPI:
    """Create the ASGI application of a service. Its lifespan starts and stops the service's threads."""

    @contextlib.asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="llava_fast", version=__version__, lifespan=running, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, settings=service.settings, count=service.metrics.request)
    if service.settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    handle_errors(app)
    app.router.route_class = JsonRoute

    @app.get("/health")
    async def health() -> Response:
        ready = service.engine.can_answer
        return JSONResponse({"status": "ok" if ready else "the engine cannot answer: restart"}, 200 if ready else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _answered(service, body, request, ChatAnswer)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answered(service, body, request, CompletionAnswer)

    @app.post("/v1/llava_fast/plan", responses={200: {"model": PromptPlan}})
    async def plan(body: PlanRequest, request: Request) -> Response:
        return await _planned(service, body, request)

    app.mount("/static", PageFiles(directory=PAGE))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    return app


class PageFiles(StaticFiles):
    """Serves the page's files with its headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "llava_fast",
        "max_model_len": service.model.config.decoder.context_length,
        "limits": service.limits,
    }


async def _answered(service: Service, body: Body, request: Request, kind: type[Answer]) -> Response:
    """Return the complete response, or a streaming response. The place in the queue and the sequences are released
    however the request ends, also when the client disconnects."""
    deadline = asyncio.get_running_loop().time() + service.settings.deadline
    gone = threading.Event()

    async def answered() -> Answer | dict[str, Any]:
        sequences = await asyncio.wait_for(service.sequences(body, gone), service.settings.deadline)
        answer = kind(body.model, sequences, service.token_bytes)
        if body.stream:
            return answer
        async with contextlib.aclosing(service.steps(sequences, deadline)) as steps:
            return await answer.whole(steps)

    service.check(body)
    try:
        with contextlib.ExitStack() as place:
            place.enter_context(service.admitted(body.answers))
            answer = await _while_connected(request, answered(), gone)
            if isinstance(answer, Answer):
                steps = service.steps(answer.sequences, deadline)
                return Stream(steps, answer, body.with_usage, deadline, place.pop_all())
        return JSONResponse(answer)
    except Exception as error:
        raise api_error(error) from error


async def _planned(service: Service, body: PlanRequest, request: Request) -> Response:
    """Return the plan of a conversation's images. Meanwhile it holds a place in the queue like an answer."""
    service.check_model(body.model)
    try:
        with service.admitted(1, timed=False):
            gone = threading.Event()
            made = asyncio.wait_for(service.plan(body, gone), service.settings.deadline)
            return Response(await _while_connected(request, made, gone), media_type="application/json")
    except Exception as error:
        raise api_error(error) from error


async def _while_connected(request: Request, work: Coroutine[Any, Any, T], gone: threading.Event) -> T:
    """Return the result of `work`, which is cancelled when the client disconnects. `gone` is set however it ends, for
    what it left running in the pool."""
    working, disconnected = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            gone.set()
            check_wanted(gone)
        return working.result()
    finally:
        gone.set()
        working.cancel()
        disconnected.cancel()
        await asyncio.gather(working, disconnected, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """A response of server-sent events. It holds its place in the queue until the last event is sent or the client
    disconnects, upon which Starlette cancels it. A client that stops reading is disconnected SLOW seconds after the
    deadline."""

    def __init__(
        self,
        steps: AsyncGenerator[tuple[int, Step]],
        answer: Answer,
        usage: bool,
        deadline: float,
        place: contextlib.ExitStack,
    ) -> None:
        super().__init__(answer.events(steps, usage), media_type="text/event-stream")
        self.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.steps, self.deadline, self.place = steps, deadline, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self.deadline - asyncio.get_running_loop().time() + SLOW
        with self.place:
            async with contextlib.aclosing(self.steps):
                await asyncio.wait_for(super().__call__(scope, receive, send), left)
