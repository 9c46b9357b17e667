"""`llava-fast serve` as a process of its own."""

import contextlib
import signal
import threading
import time

import openai
import pytest

from tests.serve.conftest import about, ask, data_uri, png, serving

ENDLESS = {"max_tokens": 3500, "extra_body": {"ignore_eos": True}}


def test_a_stream_arrives_while_it_is_made_and_a_key_is_asked_for(model_path, model):
    with serving(model_path, "--api-key", "secret-1", "--drain", "1", LLAVA_FAST_API_KEY="") as server:
        messages = about("tell me all", data_uri(png()))
        options = {**ENDLESS, "max_tokens": 1500, "stream_options": {"include_usage": True}}
        pieces, times, began = [], [], time.monotonic()
        for chunk in ask(server.client("secret-1"), messages, stream=True, **options):
            if chunk.choices and chunk.choices[0].delta.content:
                pieces.append(chunk.choices[0].delta.content)
                times.append(time.monotonic() - began)
        assert chunk.usage.completion_tokens == 1500
        (alone,) = model.generate([{"messages": messages}], max_new_tokens=1500, ignore_eos=True)
        assert "".join(pieces) == alone.text
        # Pieces spread over the whole time: a response that is joined first has them all at the end.
        assert len(pieces) > 100
        assert times[0] < times[-1] / 3
        assert times[len(times) // 2] < times[-1] * 0.8
        for key in ("secret-2", "secret"):
            with pytest.raises(openai.AuthenticationError, match="API keys"):
                server.client(key).models.list()
        endless = ask(server.client("secret-1"), messages, stream=True, n=8, **ENDLESS)
        next(iter(endless))
        began = time.monotonic()
        server.stop()  # what does not end within the drain's time is cut off
        assert time.monotonic() - began < 8
    assert "secret" not in "".join(server.log)
    assert "tell me" not in "".join(server.log)


def test_who_goes_away_frees_the_slot_and_sigterm_drains(model_path):
    """One answer runs at a time, so the second waits until the first client has gone."""
    with serving(model_path, "--max-running", "1", "--max-waiting", "1") as server:
        client = server.client()
        stream = ask(client, about("hello"), stream=True, **ENDLESS)
        next(iter(stream))
        waiting = threading.Thread(target=_impatient, args=(server,))
        waiting.start()
        time.sleep(0.3)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client, about("hello"))
        assert int(caught.value.response.headers["retry-after"]) >= 1
        stream.close()
        waiting.join()  # went away by its own time limit, while it ran or waited
        began = time.monotonic()
        assert ask(client, about("hello")).choices
        assert time.monotonic() - began < 1.5

        options = {**ENDLESS, "max_tokens": 1500, "stream_options": {"include_usage": True}}
        stream = iter(ask(client, about("hello"), stream=True, **options))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.usage.completion_tokens == 1500
        assert server.process.wait(10) in (0, -signal.SIGTERM)


def _impatient(server) -> None:
    with contextlib.suppress(openai.APIError):
        ask(server.client(timeout=1), about("hello"), **ENDLESS)
