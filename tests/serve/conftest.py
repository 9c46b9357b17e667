"""A real server process of a tiny model, and the official client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import tiny

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")


class Server:
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

    def client(self, key: str = "none", timeout: float = 60) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=timeout)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@contextmanager
def serving(model: str, *options: str, **environment: str) -> Iterator[Server]:
    server = Server(model, *options, **environment)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    folder: Path = tmp_path_factory.mktemp("served")
    tiny.save(tiny.CASES["next"], tiny.hf_model(tiny.CASES["next"]), folder)
    return str(folder)


@pytest.fixture(scope="session")
def server(model_path) -> Iterator[Server]:
    with serving(model_path) as running:
        yield running


@pytest.fixture(scope="session")
def client(server) -> openai.OpenAI:
    return server.client()
