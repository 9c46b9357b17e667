"""Servers of a tiny model, as a process of their own or as a thread here, and OpenAI's own client."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import openai
import pytest
import uvicorn
from PIL import Image

from llava_fast.serve.app import create_app
from llava_fast.serve.service import Service
from llava_fast.serve.settings import Settings
from tests.support import tiny


class Asked:
    """Somewhere to ask."""

    url: str

    def client(self, key: str = "none", timeout: float = 60) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=timeout)


class Server(Asked):
    """`llava-fast serve` as a process of its own, on a free port."""

    def __init__(self, model: str, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "llava_fast", "serve", model, "--port", "0", "--name", "tiny", *options]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.log: list[str] = []
        self.url = self._url()
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()

    def _url(self) -> str:
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                return found[1]
        raise AssertionError("the server did not start:\n" + "".join(self.log))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@contextlib.contextmanager
def serving(model: str, *options: str, **environment: str) -> Iterator[Server]:
    server = Server(model, *options, **environment)
    try:
        yield server
    finally:
        server.stop()


class Local(Asked):
    """The same application on a thread of this process."""

    def __init__(self, model, **settings) -> None:
        self.service = Service(model, Settings(model_name="tiny", **settings))
        config = uvicorn.Config(create_app(self.service), port=0, log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert self.service.engine.scheduler.stats.used_blocks == 0


@contextlib.contextmanager
def local(model, **settings) -> Iterator[Local]:
    server = Local(model, **settings)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def model():
    return tiny.pair("next").ours


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("served")
    tiny.save(tiny.CASES["next"], tiny.hf_model(tiny.CASES["next"]), folder)
    return str(folder)


@pytest.fixture(scope="session")
def server(model) -> Iterator[Local]:
    with local(model, max_images=3, max_pixels=200_000, max_body_bytes=400_000) as running:
        yield running


@pytest.fixture(scope="session")
def client(server) -> openai.OpenAI:
    return server.client()


def png(height: int = 60, width: int = 90, seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(tiny.picture(height, width, seed)).save(file, "PNG")
    return file.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def about(text: str, *urls: str) -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def error_of(call, *arguments, **options) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call(*arguments, **options)
    assert caught.value.status_code < 500, caught.value
    return caught.value


def ask(client, messages, **options):
    return client.chat.completions.create(
        model="tiny", messages=messages, **{"temperature": 0, "max_tokens": 12, **options}
    )
