"""The options of every command that asks a chat endpoint, and how such a command asks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_fast.endpoint import Ask, Endpoint, Replies, Request, Store, ask_all, dry_run, estimate
from llava_fast.endpoint.settings import OPENAI

_PANEL = "Endpoint"


@dataclass(frozen=True)
class Asking:
    """What the options say: the endpoint, where replies are kept (None: beside the output), whether to only show a
    prompt, and whether to ask the user before the first request."""

    endpoint: Endpoint
    replies: Path | None
    dry_run: bool
    confirm: bool = False

    def at(self, base_url: str, model: str, api_key_env: str) -> Asking:
        """The same limits for another endpoint, which has a key and replies of its own, and no prices."""
        other = dataclasses.replace(
            self.endpoint,
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            price_in=None,
            price_out=None,
            max_cost=None,
        )
        return dataclasses.replace(self, endpoint=other, replies=None)

    @contextlib.contextmanager
    def opened(self, output: Path) -> Iterator[Ask]:
        """Yields what asks: it says what asking will cost, asks with a progress bar, and says what it has cost. With
        --dry-run it shows the first prompt and ends the command."""
        path = self.replies or output.with_name(f"{output.name}.replies.jsonl")
        if self.dry_run:
            yield self._show
            return
        with Store(path) as store:
            if store.unreadable:
                typer.echo(f"{path}: {store.unreadable:,} lines cannot be read, so their requests are asked again")

            unconfirmed = [self.confirm]

            def ask(requests: Sequence[Request], title: str) -> Replies:
                expected = estimate(requests, self.endpoint, store)
                typer.echo(f"{title}: {expected}")
                if unconfirmed[0] and expected.requests:
                    typer.confirm(f"Ask {self.endpoint.model} at {self.endpoint.base_url}?", abort=True)
                    unconfirmed[0] = False
                asked = ask_all(requests, self.endpoint, store, title)
                typer.echo(f"{title}: {asked}")
                return Replies(store, asked.keys)

            yield ask

    def _show(self, requests: Sequence[Request], title: str) -> Replies:
        typer.echo(dry_run(requests, self.endpoint))
        raise typer.Exit


def _option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_PANEL, help=text, **more)


def _options(
    endpoint: Annotated[
        str, _option("The endpoint's base URL, as http://127.0.0.1:8000/v1.", envvar="OPENAI_BASE_URL")
    ] = OPENAI,
    endpoint_model: Annotated[str, _option("The model to ask, by the endpoint's name for it.")] = "gpt-4.1-mini",
    api_key_env: Annotated[
        str, _option("The environment variable that holds the key, which is never logged.")
    ] = "OPENAI_API_KEY",
    concurrency: Annotated[int, _option("Most requests in flight.", min=1)] = 16,
    requests_per_minute: Annotated[float | None, _option("Most attempts a minute.", min=0.001)] = None,
    tokens_per_minute: Annotated[float | None, _option("Most tokens a minute, as estimated.", min=1)] = None,
    timeout: Annotated[float, _option("Seconds that one attempt may take.", min=0.001)] = 120,
    attempts: Annotated[int, _option("How often a request is tried before it is left for the next run.", min=1)] = 6,
    price_in: Annotated[float | None, _option("Dollars for a million prompt tokens: shows the cost.", min=0)] = None,
    price_out: Annotated[float | None, _option("Dollars for a million reply tokens.", min=0)] = None,
    max_cost: Annotated[float | None, _option("Dollars after which this run stops; replies are kept.", min=0)] = None,
    replies: Annotated[
        Path | None, _option("Where every raw reply is kept. Default: beside the output. Delete it to ask anew.")
    ] = None,
    dry_run: Annotated[bool, _option("Show one prompt and the estimate, ask nothing.", "--dry-run")] = False,
) -> Asking:
    settings = Endpoint(
        model=endpoint_model,
        base_url=endpoint,
        api_key_env=api_key_env,
        concurrency=concurrency,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        timeout=timeout,
        attempts=attempts,
        price_in=price_in,
        price_out=price_out,
        max_cost=max_cost,
    )
    return Asking(settings, replies, dry_run)


def with_endpoint(command: Callable[..., None]) -> Callable[..., None]:
    """A Typer command with the options above in place of `command`'s parameter `asking`."""
    own = inspect.signature(command, eval_str=True)
    shared = inspect.signature(_options, eval_str=True)

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        asking = _options(**{name: given.pop(name) for name in shared.parameters})
        command(**given, asking=asking)

    kept = [each for name, each in own.parameters.items() if name != "asking"]
    keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*kept, *shared.parameters.values())]
    wrapped.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {each.name: each.annotation for each in keyword_only}
    del wrapped.__wrapped__  # type: ignore[attr-defined]
    return wrapped
