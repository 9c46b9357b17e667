"""Fetching of URLs in requests: from allowed hosts only, never from private addresses, with limits on size, time and
redirects.

A host name is resolved once and the connection uses the IP address that was checked. This prevents DNS rebinding.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any

from llava_fast.serve.errors import ApiError, check_wanted

MAX_REDIRECTS = 3
PIECE = 64 << 10
INTERNAL = tuple(map(ipaddress.ip_network, ("fec0::/10", "::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48")))
"""Site-local, IPv4-compatible, IPv4-translated and local NAT64 addresses, which ipaddress takes for global."""


def fetch(
    url: str, allowed: Sequence[str], max_bytes: int, seconds: float, gone: threading.Event | None = None
) -> bytes:
    """Return the body of an http or https URL. `allowed` lists host names ("*.example.org" allows all subdomains).
    Raises ApiError if the host is not allowed or private, if the request fails, and once `gone` is set."""
    gone = gone or threading.Event()
    ends = time.monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        check_wanted(gone)
        parts = _parsed(url)
        check_host(parts.hostname or "", allowed)
        with _connected(parts, ends) as connection:
            try:
                path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
                connection.request("GET", path, headers={"Accept": "image/*, video/*", "User-Agent": "llava_fast"})
                response = connection.getresponse()
                if response.status in (301, 302, 303, 307, 308) and (location := response.getheader("Location")):
                    url = urllib.parse.urljoin(url, location)
                    continue
                if response.status != 200:
                    raise _failed(f"it answered with status {response.status}")
                return _body(response, max_bytes, ends, gone)
            except ApiError:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _failed(f"{type(error).__name__}") from error
    raise _failed(f"it redirects more than {MAX_REDIRECTS} times")


def check_host(host: str, allowed: Sequence[str]) -> None:
    """Raise ApiError 403 if the host is not allowed."""
    host = host.lower().rstrip(".")
    for each in map(str.lower, allowed):
        if host == each or (each.startswith("*.") and host.endswith(each[1:])):
            return
    raise ApiError(
        403, "addresses are fetched only from the hosts that the server was started with (--allow-remote)", "messages"
    )


def public_address(host: str, port: int, seconds: float) -> tuple[int, str]:
    """Return (address family, IP address) to connect to. Raises ApiError if any address of the host is not public."""
    try:
        found = _resolved(host, port, seconds)
    except (OSError, UnicodeError) as error:
        raise _failed("its name does not resolve") from error
    addresses = [(family, str(where[0])) for family, _, _, _, where in found]
    for _, address in addresses:
        if not is_public(address):
            raise ApiError(403, "the address leads to a private network, which is never fetched", "messages")
    return addresses[0]


def _resolved(host: str, port: int, seconds: float) -> list[Any]:
    """Return the result of getaddrinfo, called in a thread because it has no timeout. After `seconds`, ApiError is
    raised while the thread continues. Errors of getaddrinfo are raised too."""
    resolved: Future[list[Any]] = Future()

    def resolve() -> None:
        try:
            resolved.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            resolved.set_exception(error)

    threading.Thread(target=resolve, name="llava-fast-resolve", daemon=True).start()
    if not wait([resolved], seconds).done:
        raise _failed("it took too long")
    return resolved.result()


def is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in network for network in INTERNAL):
        return False
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if mapped is None and ip.version == 6 and ip in ipaddress.ip_network("64:ff9b::/96"):
        mapped = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not ip.is_multicast and (mapped is None or (mapped.is_global and not mapped.is_multicast))


def _parsed(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        bad = True
    if bad or parts.username is not None or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        raise ApiError(
            400, "an address must be http://HOST/... or https://HOST/..., percent-encoded, no user", "messages"
        )
    return parts


class _Connection(http.client.HTTPConnection):
    """A connection to a given IP address, with the host name in TLS and the Host header."""

    def __init__(self, host: str, port: int, address: tuple[int, str], secure: bool, seconds: float) -> None:
        super().__init__(host, port, timeout=seconds)
        self.address, self.secure = address, secure
        # A socket's timeout restarts with every received byte.
        self._socket: socket.socket | None = None
        self._aborted = False
        self._timer = threading.Timer(seconds, self._abort)
        self._timer.daemon = True

    def connect(self) -> None:
        family, address = self.address
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self._watch(self.sock)
        self.sock.connect((address, self.port))
        if self.secure:
            context = ssl.create_default_context()
            # The handshake starts only after the timer knows the TLS socket, which replaces the plain one.
            secured = context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self.sock = secured
            self._watch(secured)
            secured.do_handshake()

    def _watch(self, used: socket.socket) -> None:
        self._socket = used  # http.client sets `sock` to None when a response closes the connection
        if self._aborted:
            raise TimeoutError

    def _abort(self) -> None:
        self._aborted = True
        if self._socket is None:
            return
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> _Connection:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.close()


def _connected(parts: urllib.parse.SplitResult, ends: float) -> _Connection:
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    host = parts.hostname or ""
    address = public_address(host, port, _left(ends))
    return _Connection(host, port, address, secure, _left(ends))


def _body(response: http.client.HTTPResponse, max_bytes: int, ends: float, gone: threading.Event) -> bytes:
    pieces, size = [], 0
    while piece := response.read1(PIECE):
        check_wanted(gone)
        size += len(piece)
        if size > max_bytes:
            raise _failed(f"it has more than {max_bytes} bytes")
        pieces.append(piece)
    _left(ends)  # a body that was cut off at the timeout looks like a complete one
    return b"".join(pieces)


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise _failed("it took too long")
    return left


def _failed(why: str) -> ApiError:
    return ApiError(400, f"an address could not be fetched: {why}", "messages")
