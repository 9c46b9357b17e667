"""A chat endpoint on a thread of this process that answers by a function and fails as it is told to."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "429", "drop", "truncate", "stall", "trickle", "not json", "no choices", "list", "number", "half pair")
"""Faults after which a request is tried again; but "half pair" is a reply whose text holds half a surrogate pair."""
REPLIES = ("empty", "refusal", "length")
"""Replies that are well formed and no answer."""


class ScriptedEndpoint:
    """Speaks POST /v1/chat/completions.

    answer   from a request's body to the reply's text, or to a whole JSON reply.
    fault    from (body, number of the request, from 0) to the name of a fault, or None for an answer.
    stall    seconds that a stalled reply takes.

    bodies, headers, times   of all requests so far. most_at_once: the most requests that were in flight together.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Any] = lambda body: "Fine.",
        fault: Callable[[dict[str, Any], int], str | None] = lambda body, number: None,
        stall: float = 5.0,
        delay: float = 0.0,
    ) -> None:
        self.answer, self.fault, self.stall, self.delay = answer, fault, stall, delay
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        outer = self

        class Handler(_Handler):
            endpoint = outer

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def texts(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def stop(self) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def scripted(*given: Any, **options: Any) -> Iterator[ScriptedEndpoint]:
    endpoint = ScriptedEndpoint(*given, **options)
    try:
        yield endpoint
    finally:
        endpoint.stop()


def completion(text: str | None, finish: str = "stop", refusal: str | None = None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": refusal}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "scripted",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    endpoint: ScriptedEndpoint
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        ours = self.endpoint
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with ours.lock:
            number = len(ours.bodies)
            ours.bodies.append(body)
            ours.headers.append({name.lower(): value for name, value in self.headers.items()})
            ours.times.append(time.monotonic())
            ours.at_once += 1
            ours.most_at_once = max(ours.most_at_once, ours.at_once)
        try:
            if ours.delay:
                ours.stopping.wait(ours.delay)
            self.reply(body, ours.fault(body, number))
        finally:
            with ours.lock:
                ours.at_once -= 1

    def reply(self, body: dict[str, Any], fault: str | None) -> None:
        ours = self.endpoint
        if fault is None:
            answer = ours.answer(body)
            return self.send(200, json.dumps(answer if isinstance(answer, dict) else completion(answer)))
        if fault.isdigit():
            status, _, headers = fault, None, {"retry-after-ms": "20"} if fault == "429" else {}
            return self.send(int(status), json.dumps({"error": {"message": f"scripted {status}"}}), **headers)
        whole = json.dumps(completion("Fine."))
        if fault == "drop":
            return self.hang_up()
        if fault == "truncate":
            self.send(200, whole[:30], length=len(whole))
            return self.hang_up()
        if fault == "stall":
            ours.stopping.wait(ours.stall)
            return self.hang_up()
        if fault == "trickle":
            self.send(200, "", length=len(whole))
            for character in whole:
                self.wfile.write(character.encode())
                if ours.stopping.wait(0.02):
                    break
            return self.hang_up()
        texts = {
            "not json": "<html>busy</html>",
            "no choices": '{"choices": []}',
            "list": "[1]",
            "number": json.dumps(completion(7)),  # type: ignore[arg-type]
            "half pair": json.dumps(completion("\ud800")),
            "empty": json.dumps(completion("")),
            "refusal": json.dumps(completion(None, refusal="I cannot help with that.")),
            "length": json.dumps(completion("An unfinished", "length")),
        }
        return self.send(200, texts[fault])

    def send(self, status: int, text: str, length: int | None = None, **headers: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
