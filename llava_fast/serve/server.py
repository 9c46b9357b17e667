"""A server process: load the model, listen, drain on SIGTERM."""

from __future__ import annotations

import importlib
import logging
import socket
from typing import Any

from llava_fast.errors import MissingPackageError, ServeError
from llava_fast.serve.settings import Settings

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")


def check_packages() -> None:
    """Raise MissingPackageError if a package of the extra `serve` is not installed."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingPackageError("the server", package, "serve") from error


def check_address(host: str, port: int) -> None:
    """Raises ServeError where the server could not listen, so that it is known before a model is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise ServeError(f"cannot listen on {host}, port {port}: {error}. Choose another --host or --port") from error


def serve(model: Any, settings: Settings, host: str, port: int) -> None:
    """Serve requests until SIGTERM or SIGINT; then reject new ones and wait up to `settings.drain` seconds for running
    ones. Raises MissingPackageError."""
    check_packages()
    import uvicorn

    from llava_fast.serve.app import create_app
    from llava_fast.serve.service import Service

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    config = uvicorn.Config(
        create_app(Service(model, settings)),
        host=host,
        port=port,
        timeout_graceful_shutdown=max(1, round(settings.drain)),
        log_config=None,
        access_log=False,
        server_header=False,
    )
    uvicorn.Server(config).run()
