"""The settings of a server: access, and every limit in one place."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from urllib.parse import urlsplit

from llava_fast.errors import ServeError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server. `llava-fast serve --help` describes the corresponding options.

    model_name          the model name for clients.
    api_keys            accepted API keys (none: no key is needed).
    max_running         most answers generated at once.
    batch_invariant     answers are bit-identical whatever runs at the same time (see Runner); then nothing is kept for
                        later prompts, and long prompts are not chunked.
    chunk_rows          most prompt rows per step.
    max_waiting         most answers that may wait beyond those; more get status 429.
    deadline            seconds from a request's arrival to its end; then it ends with an error.
    drain               seconds that running answers may still take after SIGTERM.
    workers             threads that read images and tokenise.
    max_body_bytes      largest request body, file or video.
    body_seconds        seconds that a body may take to arrive.
    max_held_bytes      most bytes of all bodies in memory; more get status 429.
    max_images          most images in a request.
    max_pixels          most pixels of an image, and of those frames of a video that are used together.
    video_frames        how many frames of a video are used (None: 16, or the model's own number or rate).
    max_frames          most frames of a video file.
    allow_remote        hosts from which images and videos are fetched ("*.example.org": all subdomains); none: nothing
                        is fetched. `max_remote_bytes` limits each fetch, `remote_seconds` those of a request
                        together.
    allow_files         folders whose files clients may use; none: no file is read.
    host_names          accepted host names besides localhost and IP addresses ("*": any).
    allow_origins       allowed origins of web pages (CORS); none: only the server's own page.
    literal_text        treat control tokens and placeholders in a client's text as text (see inputs.literal).
    prefix_bytes        size of the KV cache that is kept for prompts with a common prefix.
    feature_bytes       size of the cache of image features.
    max_prompt_tokens   longest prompt, visual tokens included (None: the model's context).
    max_answer_tokens   longest answer, and the default if a request sets none (None: the model's context).
    max_choices         most answers to one request (`n`).

    Raises ServeError for a value out of range.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    max_running: int = 32
    batch_invariant: bool = False
    chunk_rows: int = 1024
    max_waiting: int = 128
    deadline: float = 600.0
    drain: float = 30.0
    workers: int = 2
    max_body_bytes: int = 32 << 20
    body_seconds: float = 60.0
    max_held_bytes: int = 512 << 20
    max_images: int = 16
    max_pixels: int = 64 << 20
    max_frames: int = 3000
    allow_remote: tuple[str, ...] = ()
    max_remote_bytes: int = 32 << 20
    remote_seconds: float = 10.0
    allow_files: tuple[Path, ...] = ()
    host_names: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    literal_text: bool = True
    video_frames: int | None = None
    prefix_bytes: int = 1 << 30
    feature_bytes: int = 256 << 20
    max_prompt_tokens: int | None = None
    max_answer_tokens: int | None = None
    max_choices: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            may_be_none = value is None and kind == "int | None"
            least = 0 if field.name in ("max_waiting", "prefix_bytes", "feature_bytes") else 1
            if "int" in str(kind) and not may_be_none and (not isinstance(value, Integral) or value < least):
                raise ServeError(f"{field.name} must be a whole number, {least} or more, got {value!r}")
            if kind == "float" and not (isinstance(value, Real) and 0 < float(value) < float("inf")):
                raise ServeError(f"{field.name} must be a number of seconds above 0, got {value!r}")
        if not all(key.strip() and key.isascii() for key in self.api_keys):
            raise ServeError("an API key must be ASCII text that is not empty")
        for folder in self.allow_files:
            if not folder.is_dir():
                raise ServeError(f"the folder {folder} of allow_files does not exist")
        wrong_names = [("allow_remote", name) for name in self.allow_remote if not _is_host(name.removeprefix("*."))]
        wrong_names += [("host_names", name) for name in self.host_names if name != "*" and not _is_host(name)]
        if wrong_names:
            setting, name = wrong_names[0]
            raise ServeError(
                f"{setting}: {name!r} matches no host: write its name alone, as images.example.org, without scheme, "
                "port and path, other letters than ASCII's in IDNA (xn--...)"
            )
        for origin in self.allow_origins:
            if origin not in ("*", "null") and not _is_origin(origin):
                raise ServeError(
                    f"allow_origins: {origin!r} matches no origin: write each as browsers send it, as "
                    "https://app.example.org, in lower case, without user, path, wildcard and the scheme's own port"
                )


def _is_host(name: str) -> bool:
    """Whether a request's host name can equal this one."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return re.fullmatch(r"[\w-]+(\.[\w-]+)*", name, re.ASCII) is not None
    return True


def _is_origin(text: str) -> bool:
    """Whether it is what browsers send as Origin (RFC 6454, section 6.2)."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    origin = f"{parts.scheme}://[{host}]" if ":" in host else f"{parts.scheme}://{host}"
    if port is not None and port != {"http": 80, "https": 443}.get(parts.scheme):
        origin += f":{port}"
    return _is_host(host) and text == origin
