"""The options that commands which ask an endpoint share."""

from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from llava_fast.cli.endpoint import Asking, with_endpoint
from llava_fast.endpoint import Request
from llava_fast.errors import EndpointError
from tests.support.scripted_endpoint import scripted


@pytest.fixture
def app():
    made = typer.Typer()

    @made.command()
    @with_endpoint
    def command(words: list[str], asking: Asking, out: Annotated[Path, typer.Option(help="Where to.")]) -> None:
        """Ask about words."""
        with asking.opened(out) as ask:
            replies = ask([Request([{"role": "user", "content": word}]) for word in words], "words")
            out.write_text("\n".join(reply.text if reply else "-" for reply in replies))

    return made


def run(app, *arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_a_command_asks_and_goes_on(app, tmp_path):
    out = tmp_path / "out.txt"
    with scripted(lambda body: body["messages"][0]["content"].upper()) as server:
        options = ("--out", out, "--endpoint", server.url, "--endpoint-model", "m", "--price-in", 1, "--price-out", 1)
        first = run(app, "one", "two", *options)
        assert first.exit_code == 0, first.output
        assert out.read_text() == "ONE\nTWO"
        assert (tmp_path / "out.txt.replies.jsonl").is_file()
        assert "words: 2 requests to ask" in first.output
        assert "about $0.00 or less" in first.output
        assert "words: 2 replies (0 more were there already), 0 retries, 20 + 10 tokens, $0.00" in first.output
        again = run(app, "one", "two", *options)
        assert "words: all 2 replies are there already: nothing is asked" in again.output
        assert len(server.bodies) == 2


def test_a_dry_run_writes_nothing(app, tmp_path):
    result = run(app, "one", "--out", tmp_path / "out.txt", "--dry-run")
    assert result.exit_code == 0
    assert "[user]\none\n" in result.output
    assert not list(tmp_path.iterdir())


def test_a_bad_setting_is_the_packages_own_error(app, tmp_path):
    result = run(app, "one", "--out", tmp_path / "out.txt", "--endpoint", "ftp://x")
    assert isinstance(result.exception, EndpointError)


def test_help_shows_the_shared_options(app):
    text = run(app, "--help").output
    for words in ("Ask about words.", "--dry-run", "--api-key-env", "--out"):
        assert words in text
    assert "--asking" not in text
