"""Send many requests concurrently, with rate limits and retries. Each reply is stored as soon as it arrives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from tqdm import tqdm

from llava_fast.endpoint.cost import estimate
from llava_fast.endpoint.pace import Pace
from llava_fast.endpoint.replies import MalformedReply, Reply, Store
from llava_fast.endpoint.requests import Request
from llava_fast.endpoint.settings import Endpoint
from llava_fast.errors import EndpointError, MissingPackageError
from llava_fast.storage.journal import without

Ask = Callable[[Sequence[Request], str], Sequence["Reply | None"]]
"""A function from requests and a title to their replies in order (None for a failed request)."""

_RETRIED = (408, 409, 425, 429)
_STOPS = (401, 403, 404)  # these errors affect all requests
_FAILURES_IN_A_ROW = 20
_LONGEST_RETRY_AFTER = 3600.0
_SHOWN = 300  # shown characters of an error message of the endpoint


@dataclass
class Asked:
    """The outcome of a call of `ask_all`.

    keys          the key of each request, in order; `Store.get(key)` is None for a failed request.
    replied, kept, failed   new replies, replies stored before, failed requests (equal ones counted once).
    retries       attempts after the first.
    reasons       number of failed requests per reason.
    prompt_tokens, reply_tokens, dollars   of this run; dollars is None without prices.
    estimated     replies without usage, whose tokens are those of `Request.tokens`, close to an upper bound.
    """

    keys: list[str] = field(default_factory=list)
    replied: int = 0
    kept: int = 0
    failed: int = 0
    retries: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    reply_tokens: int = 0
    dollars: float | None = None
    estimated: int = 0

    def __str__(self) -> str:
        cost = "" if self.dollars is None else f", ${self.dollars:,.2f}"
        text = (
            f"{self.replied:,} replies ({self.kept:,} more were there already), {self.retries:,} retries, "
            f"{self.prompt_tokens:,} + {self.reply_tokens:,} tokens{cost}"
        )
        if self.estimated:
            text += f" (estimated for {self.estimated:,} replies, whose tokens the endpoint does not tell)"
        if self.failed:
            reason, count = self.reasons.most_common(1)[0]
            text += f"; {self.failed:,} requests failed ({count:,}: {reason}): the same command asks them again"
        return text


def ask_all(
    requests: Sequence[Request], endpoint: Endpoint, store: Store, title: str = "asking", progress: bool = True
) -> Asked:
    """Send every request without a reply in `store`, and store the replies.

    requests  a list, or a sequence that creates its requests on access.

    After an interruption, the same call continues. A failed request does not stop the others. Raises EndpointError if
    no request can succeed (wrong key or model, no connection, no quota), if the cost has reached its limit, or if
    replies cannot be written. Before it is raised, requests in flight are completed and their replies stored. Raises
    MissingPackageError without openai.
    """
    return asyncio.run(ask_all_async(requests, endpoint, store, title, progress))


async def ask_all_async(
    requests: Sequence[Request], endpoint: Endpoint, store: Store, title: str = "asking", progress: bool = True
) -> Asked:
    """`ask_all` as a coroutine."""
    with tqdm(total=len(requests), desc=title, unit="request", disable=not progress) as bar:
        run = _Run(endpoint, store, bar)
        try:
            return await run.all(requests)
        finally:
            await run.client.close()


def dry_run(requests: Sequence[Request], endpoint: Endpoint, store: Store | None = None) -> str:
    """Return the first request and the cost estimate as text. No request is sent and no key is needed.

    Raises EndpointError if there is no request.
    """
    if not requests:
        raise EndpointError("there is nothing to ask: the data gives no request")
    count = estimate(requests, endpoint, store)
    return f"{requests[0].shown()}\n\nmodel {endpoint.model} at {endpoint.base_url}: {count}"


class _Retry(Exception):
    """A failed attempt that may succeed if repeated. `wait` is the delay in seconds requested by the endpoint."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class _Failed(Exception):
    """A request that failed permanently."""


class _Run:
    def __init__(self, endpoint: Endpoint, store: Store, bar: tqdm) -> None:
        self.openai = _openai()
        self.endpoint, self.store, self.bar = endpoint, store, bar
        self.secret = endpoint.api_key()
        # Only the client gets the key. max_retries=0, because this class paces and counts attempts.
        self.client = self.openai.AsyncOpenAI(
            base_url=endpoint.base_url, api_key=self.secret, timeout=endpoint.timeout, max_retries=0
        )
        self.requests, self.tokens = Pace(endpoint.requests_per_minute), Pace(endpoint.tokens_per_minute)
        self.asked = Asked(dollars=endpoint.cost(0, 0))
        self.in_flight: dict[str, asyncio.Future[None]] = {}
        self.given_up: set[str] = set()
        self.in_a_row = 0
        self.stop: EndpointError | None = None
        self.stopped = asyncio.Event()
        self.jitter = random.Random()

    async def all(self, requests: Sequence[Request]) -> Asked:
        numbers = iter(range(len(requests)))

        async def worker() -> None:
            for number in numbers:  # shared by all workers
                if self.stop:
                    return
                await self.one(requests[number])

        workers = [asyncio.ensure_future(worker()) for _ in range(min(self.endpoint.concurrency, len(requests)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for each in workers:
                each.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        if self.stop:
            raise self.stop
        return self.asked

    async def one(self, request: Request) -> None:
        """Send a request unless its reply is stored or an equal request is in flight or has failed."""
        key = request.key(self.endpoint.model)
        self.asked.keys.append(key)
        if key in self.in_flight:
            await asyncio.shield(self.in_flight[key])
        elif key not in self.given_up:
            if key in self.store:
                self.asked.kept += 1
            else:
                self.in_flight[key] = asyncio.get_running_loop().create_future()
                try:
                    await self.until_replied(request, key)
                finally:
                    self.in_flight.pop(key).set_result(None)
        self.bar.update()
        self.show()

    async def until_replied(self, request: Request, key: str) -> None:
        try:
            for attempt in range(self.endpoint.attempts):
                await self.sleep(max(self.tokens.turn(sum(request.tokens())), self.requests.turn()))
                if self.stop:
                    return
                self.asked.retries += attempt > 0
                try:
                    reply = self.store.keep(key, request.name, await self.attempt(request), self.secret)
                    self.count(request, reply)
                    return
                except (_Retry, MalformedReply) as error:
                    why, wait = self.said(str(error)), getattr(error, "wait", 0.0)
                if attempt + 1 < self.endpoint.attempts:
                    await self.back_off(attempt, wait)
            raise _Failed(f"{why} ({self.endpoint.attempts} attempts)")
        except _Failed as error:
            self.fail(request, key, str(error))
        except EndpointError as error:
            self.end(error)

    def end(self, error: EndpointError) -> None:
        """Start no more requests. Requests in flight are completed."""
        self.stop = self.stop or error
        self.stopped.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep, but return early when the run is ended."""
        if seconds > 0:
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), seconds)

    async def back_off(self, attempt: int, asked_for: float) -> None:
        if asked_for:
            self.requests.hold(asked_for)
        own = min(self.endpoint.longest_wait, self.endpoint.backoff * 2**attempt)
        await self.sleep(max(asked_for, own * self.jitter.uniform(0.5, 1.0)))

    async def attempt(self, request: Request) -> dict[str, Any]:
        """Return the endpoint's JSON. Raises _Retry, _Failed, or EndpointError if no request can succeed."""
        openai = self.openai
        try:
            response = await asyncio.wait_for(self.post(request), self.endpoint.timeout)
        except (asyncio.TimeoutError, TimeoutError, openai.APITimeoutError):
            raise _Retry(f"no whole reply within {self.endpoint.timeout:g} s") from None
        except openai.APIStatusError as error:
            self.refuse(error)
        except openai.APIError as error:  # no connection, or a lost one
            raise _Retry(self.said(f"{error} {error.__cause__ or ''}")) from None
        try:
            return json.loads(response)
        except (ValueError, RecursionError):
            raise MalformedReply(self.said("it is no JSON: " + response.decode("utf-8", "replace"))) from None

    async def post(self, request: Request) -> bytes:
        """Return the complete body of the response."""
        create = self.client.chat.completions.with_raw_response.create
        raw = await create(model=self.endpoint.model, messages=list(request.messages), extra_body=dict(request.options))
        return raw.content

    def refuse(self, error: Any) -> None:
        """Raise the exception for an HTTP status."""
        status, headers = error.status_code, error.response.headers
        said = self.said(f"HTTP {status}: {_message(error)}")
        if status in _STOPS or (status == 429 and "insufficient_quota" in str(error.body)):
            raise EndpointError(f"{self.endpoint.base_url} refuses model {self.endpoint.model}: {said}") from None
        if status in _RETRIED or status >= 500:
            raise _Retry(said, _retry_after(headers)) from None
        raise _Failed(said) from None

    def count(self, request: Request, reply: Reply) -> None:
        asked = self.asked
        asked.replied, self.in_a_row = asked.replied + 1, 0
        tokens = (reply.prompt_tokens, reply.reply_tokens)
        if not reply.prompt_tokens or (reply.text and not reply.reply_tokens):
            asked.estimated += 1
            tokens = request.tokens()
        asked.prompt_tokens += tokens[0]
        asked.reply_tokens += tokens[1]
        asked.dollars = self.endpoint.cost(asked.prompt_tokens, asked.reply_tokens)
        if self.endpoint.max_cost is not None and (asked.dollars or 0) >= self.endpoint.max_cost:
            text = f"this run has cost ${asked.dollars:,.2f} of at most ${self.endpoint.max_cost:,.2f}"
            self.end(EndpointError(f"{text}: its replies are kept; run it again to go on"))

    def fail(self, request: Request, key: str, why: str) -> None:
        self.given_up.add(key)
        self.asked.failed += 1
        self.asked.reasons[why] += 1
        self.in_a_row += 1
        try:
            self.store.note_failure(key, request.name, why, self.secret)
        except EndpointError as error:  # a full disk
            self.end(error)
        if self.in_a_row >= max(_FAILURES_IN_A_ROW, self.endpoint.concurrency):
            text = f"{self.in_a_row} requests in a row failed, the last: {why}. Replies so far are kept"
            self.end(EndpointError(f"{text}; see that {self.endpoint.base_url} works, and run this again"))

    def said(self, text: str) -> str:
        """Shorten a message of the endpoint to one line and remove the key."""
        line = " ".join(without(text, self.secret).split())
        return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."

    def show(self) -> None:
        asked = self.asked
        parts = [f"{asked.prompt_tokens + asked.reply_tokens:,} tokens"]
        parts += [] if asked.dollars is None else [f"${asked.dollars:,.2f}"]
        parts += [f"{asked.retries:,} retries"] if asked.retries else []
        parts += [f"{asked.failed:,} failed"] if asked.failed else []
        self.bar.set_postfix_str(", ".join(parts), refresh=False)


def _message(error: Any) -> str:
    body = error.body
    inner = body.get("error", body) if isinstance(body, dict) else body
    message = inner.get("message") if isinstance(inner, dict) else inner
    return str(message or error)


def _retry_after(headers: Any) -> float:
    """Return the seconds of Retry-After (seconds or a date) or of OpenAI's retry-after-ms, or 0 without either."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            return _bounded(float(value) * scale)
        except ValueError:
            pass
    try:
        return _bounded(parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _bounded(seconds: float) -> float:
    return min(seconds, _LONGEST_RETRY_AFTER) if seconds > 0 else 0.0  # NaN too


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise MissingPackageError("asking an endpoint", "openai", "endpoint") from None
    return openai
