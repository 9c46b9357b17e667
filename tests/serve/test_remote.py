"""Fetching pictures: from hosts that are allowed, never from the server's own network, within limits."""

import contextlib
import http.client
import http.server
import json
import socket
import threading
import time

import pytest

from llava_fast.serve import remote
from llava_fast.serve.errors import ApiError
from llava_fast.serve.media import Media
from llava_fast.serve.settings import Settings
from tests.serve.conftest import about, ask, data_uri, error_of, local, png


class Pictures(http.server.BaseHTTPRequestHandler):
    """/a.png a picture; /to/X redirects to X; /endless; /slow drips; /late waits; /gone 404."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif self.path == "/gone":
            self.send_error(404)
        elif self.path in ("/endless", "/slow"):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"x" * (10_000 if self.path == "/endless" else 1))
                    time.sleep(0.03 if self.path == "/slow" else 0)
        else:
            time.sleep(0.2 if self.path == "/late" else 0)
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(png())

    def log_message(self, *_):
        pass


@pytest.fixture
def pictures(monkeypatch):
    """A web server on loopback, and loopback taken for a public network."""
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    monkeypatch.setattr(Pictures, "asked", [])
    monkeypatch.setattr(remote, "is_public", lambda address: address in ("127.0.0.1", "::1"))
    yield f"http://localhost:{web.server_port}"
    web.shutdown()
    web.server_close()


def test_an_allowed_address_is_fetched(model, pictures):
    with local(model, allow_remote=("localhost",)) as server:
        client = server.client()
        plain = ask(client, about("hello", data_uri(png())))
        assert ask(client, about("hello", f"{pictures}/a.png")).choices[0].message == plain.choices[0].message
        error = error_of(ask, client, about("hello", pictures.replace("localhost", "127.0.0.1") + "/a.png"))
        assert error.status_code == 403
    assert Pictures.asked == ["/a.png"]


def test_no_address_is_fetched_by_default(client, pictures):
    assert error_of(ask, client, about("hello", f"{pictures}/a.png")).status_code == 403
    assert Pictures.asked == []


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/endless", "more than 50000 bytes"),
        ("/slow", "too long|timed out|TimeoutError"),
        ("/gone", "status 404"),
        ("/to/http://127.0.0.1/a.png", "allow-remote"),
        ("/to/" * 9 + "/a.png", "redirects more than 3"),
        ("/to/file:///etc/passwd", "http://HOST"),
    ],
)
def test_a_fetch_is_bounded(pictures, path, says):
    began = time.monotonic()
    with pytest.raises(ApiError, match=says):
        remote.fetch(pictures + path, ["localhost"], 50_000, 0.5)
    assert time.monotonic() - began < 2


def test_all_fetches_of_a_request_are_bounded_together(pictures):
    settings = Settings(model_name="m", allow_remote=("localhost",), remote_seconds=0.3)
    reading = Media(settings, threading.Event())
    assert reading.image(f"{pictures}/late") == png()
    with pytest.raises(ApiError, match="could not be fetched"):
        reading.image(f"{pictures}/late")
    with pytest.raises(ApiError, match="took too long"):
        reading.image(f"{pictures}/a.png")
    assert Media(settings, threading.Event()).image(f"{pictures}/late") == png(), "of the next request"


@pytest.mark.parametrize("path", ["chat/completions", "llava_fast/plan"])
def test_a_client_that_has_gone_keeps_no_thread(model, pictures, path):
    with local(model, allow_remote=("localhost",), workers=1) as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        body = json.dumps({"model": "tiny", "messages": about("hello", f"{pictures}/slow")})  # three seconds
        connection.request("POST", f"/v1/{path}", body, {"Content-Type": "application/json"})
        while not Pictures.asked:
            time.sleep(0.01)
        connection.close()
        server.service.pool.submit(int).result(timeout=1.5)


def test_redirects_within_the_host_are_followed(pictures):
    assert remote.fetch(f"{pictures}/to//to//a.png", ["localhost"], 50_000, 5) == png()


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.5.5", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"),
        *("fec0::1", "::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b:1::7f00:1"),
    ],
)
def test_private_addresses_are_never_fetched(address, monkeypatch):
    assert not remote.is_public(address)
    found = [(2, 1, 6, "", ("93.184.215.14", 80)), (2, 1, 6, "", (address, 80))]
    monkeypatch.setattr(remote.socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ApiError, match="private network"):
        remote.fetch("http://pictures.example/a.png", ["pictures.example"], 100, 1)


def test_public_addresses_are():
    assert all(map(remote.is_public, ("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:8.8.8.8")))


def test_a_name_is_resolved_once(pictures, monkeypatch):
    """A second answer that leads to a private network finds no connection."""
    calls, getaddrinfo = [], remote.socket.getaddrinfo
    monkeypatch.setattr(remote.socket, "getaddrinfo", lambda *a, **b: calls.append(a) or getaddrinfo(*a, **b))
    assert remote.fetch(f"{pictures}/a.png", ["localhost"], 50_000, 5) == png()
    assert len(calls) == 1


@pytest.mark.parametrize("host", ["a.example.org", "EXAMPLE.com", "example.com."])
def test_hosts_that_are_allowed(host):
    remote.check_host(host, ["*.example.org", "example.com"])


@pytest.mark.parametrize("host", ["example.org", "evilexample.org", "example.com.evil.org", "", "127.0.0.1"])
def test_hosts_that_are_not(host):
    with pytest.raises(ApiError):
        remote.check_host(host, ["*.example.org", "example.com"])


@pytest.mark.parametrize(
    "url", ["http://user:word@localhost/", "http://local host/", "http://localhost/\r\nX: y", "http://[", "https:///a"]
)
def test_odd_addresses_are_refused(url):
    with pytest.raises(ApiError):
        remote.fetch(url, ["localhost", "local host"], 100, 1)


def test_a_name_that_does_not_resolve_in_time_is_not_waited_for(monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: asked.wait(5))
    began = time.monotonic()
    with pytest.raises(ApiError, match="took too long"):
        remote.fetch("http://slow.example/a.png", ["slow.example"], 1000, 0.2)
    assert time.monotonic() - began < 2
    asked.set()


def test_a_handshake_that_drips_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(remote, "is_public", lambda _: True)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                for byte in b"\x16\x03\x03\x40\x00" + b"\x02" * 95:  # a record that never ends
                    connection.sendall(bytes([byte]))
                    time.sleep(0.03)

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(ApiError):
            remote.fetch(f"https://127.0.0.1:{listening.getsockname()[1]}/a.png", ["127.0.0.1"], 50_000, 0.3)
        assert time.monotonic() - began < 1.5
