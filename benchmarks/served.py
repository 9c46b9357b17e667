"""Server processes to measure, on loopback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator


class Served:
    """A server's process, the address it answers at, and the model's name there."""

    def __init__(self, process: subprocess.Popen, url: str, model: str) -> None:
        self.process, self.url, self.model = process, url, model

    def stop(self) -> int:
        """Its exit code after SIGTERM, which it is given a minute to obey."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


def llava_fast_server(model: str, *options: str) -> Served:
    command = [sys.executable, "-m", "llava_fast", "serve", model, "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen([*command, "--name", "m"], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.search(r"running on (http://\S+)", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
            return Served(process, found[1], "m")
    raise SystemExit(f"the server ended with {process.wait()}")


def transformers_server(model: str) -> Served:
    """`transformers serve`, its output thrown away."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    options = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--log-level",
        "error",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", start, "serve", model, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1):
            return Served(process, url, model)
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    raise SystemExit("transformers serve did not start")


@contextlib.contextmanager
def running(*servers: Served) -> Iterator[None]:
    """Stops them at the end, whatever happens."""
    try:
        yield
    finally:
        for server in servers:
            server.stop()
