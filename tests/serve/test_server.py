"""The server as a process, asked by OpenAI's own client."""

import base64
import contextlib
import io
import signal
import threading
import time

import openai
import pytest
from PIL import Image

import llava_fast
from tests.serve.conftest import serving
from tests.support import tiny


def data_uri(height: int = 60, width: int = 90, seed: int = 0) -> str:
    file = io.BytesIO()
    Image.fromarray(tiny.picture(height, width, seed)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def about(text: str, *images: str) -> list[dict]:
    content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def ask(client, messages, **options):
    options = {"temperature": 0, "max_tokens": 12, **options}
    return client.chat.completions.create(model="tiny", messages=messages, **options)


@pytest.fixture(scope="module")
def model(model_path):
    return llava_fast.load(model_path, device="cpu")


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert model.object == "model"


def test_an_answer_is_what_generate_gives(client, model):
    messages = about("hello there", data_uri())
    answer = ask(client, messages)
    (alone,) = model.generate([{"messages": messages}], max_new_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == alone.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == alone.finish_reason
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    assert answer.usage.completion_tokens == len(alone.token_ids)
    assert answer.usage.prompt_tokens_details.visual_tokens == alone.usage.visual_tokens


def test_a_stream_arrives_while_it_is_made(client, model):
    messages = about("tell me all", data_uri())
    options = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}, "stream_options": {"include_usage": True}}
    pieces, times, began = [], [], time.monotonic()
    for chunk in ask(client, messages, stream=True, **options):
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


def test_several_choices_differ_by_their_seed(client, model):
    messages = about("hello", data_uri())
    answer = ask(client, messages, n=3, seed=5, temperature=1.0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = [model.generate({"messages": messages}, max_new_tokens=12, temperature=1.0, seed=5 + i) for i in range(3)]
    assert [choice.message.content for choice in answer.choices] == [one.text for (one,) in alone]
    streamed = ["", "", ""]
    for chunk in ask(client, messages, n=3, seed=5, temperature=1.0, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == [one.text for (one,) in alone]


def test_errors_have_openais_form(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="another", messages=about("hello"))
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    for options, says in (
        ({"max_tokens": -1}, "max_tokens"),
        ({"extra_body": {"tools": []}}, "'tools' is not supported"),
        ({"extra_body": {"n": "two"}}, "n: "),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream=true"),
    ):
        with pytest.raises(openai.BadRequestError, match=says) as caught:
            ask(client, about("hello"), **options)
        assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match=r"cannot be|not an image"):
        ask(client, about("hello", "data:image/png;base64,aGVsbG8="))
    with pytest.raises(openai.BadRequestError, match="data URI"):
        ask(client, about("hello", "/etc/passwd"))


def test_a_key_is_asked_for(model_path):
    with serving(model_path, "--api-key", "secret-1", LLAVA_FAST_API_KEY="") as server:
        assert server.client("secret-1").models.list().data
        for key in ("secret-2", "secret"):
            with pytest.raises(openai.AuthenticationError, match="API keys"):
                server.client(key).models.list()
    assert "secret" not in "".join(server.log)


def test_who_goes_away_frees_the_slot(model_path):
    """One answer runs at a time, so the second waits until the first client has gone."""
    with serving(model_path, "--max-running", "1", "--max-waiting", "1") as server:
        client = server.client()
        endless = {"max_tokens": 3500, "extra_body": {"ignore_eos": True}}
        stream = ask(client, about("hello"), stream=True, **endless)
        next(iter(stream))
        waiting = threading.Thread(target=lambda: _quietly(ask, server.client(timeout=1), about("hello"), **endless))
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


def test_sigterm_drains(model_path):
    with serving(model_path) as server:
        options = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}, "stream_options": {"include_usage": True}}
        stream = iter(ask(server.client(), about("hello"), stream=True, **options))
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.usage.completion_tokens == 1500
        assert server.process.wait(10) in (0, -signal.SIGTERM)


def _quietly(call, *arguments, **options) -> None:
    with contextlib.suppress(openai.APIError):
        call(*arguments, **options)
