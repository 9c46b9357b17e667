"""Every field of OpenAI's that is served, asked by its own client."""

import json
import re

import openai
import pytest

from llava_fast.generation import grammar
from llava_fast.generation.grammar import Grammar
from tests.serve.conftest import about, ask, data_uri, local, png

PICTURE = data_uri(png())
SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["digit"],
    "additionalProperties": False,
}


def alone(model, messages, **options):
    (answer,) = model.generate([{"messages": messages}], **{"max_new_tokens": 12, **options})
    return answer


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/name")


def test_an_answer_is_what_generate_gives(client, model):
    messages = about("hello there", PICTURE)
    answer, expected = ask(client, messages), alone(model, messages)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (expected.text, "assistant")
    assert choice.finish_reason == expected.finish_reason
    usage = expected.usage
    assert answer.usage.prompt_tokens == usage.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == usage.prompt_tokens + len(expected.token_ids)
    assert answer.usage.prompt_tokens_details.visual_tokens == usage.visual_tokens


OPTIONS = [
    ({"temperature": 1, "seed": 3}, {"temperature": 1, "seed": 3}),
    ({"temperature": 0.7, "top_p": 0.8, "seed": 3}, {"temperature": 0.7, "top_p": 0.8, "seed": 3}),
    ({"temperature": 1, "seed": 3, "extra_body": {"top_k": 5}}, {"temperature": 1, "seed": 3, "top_k": 5}),
    ({"temperature": 1, "seed": 3, "extra_body": {"min_p": 0.2}}, {"temperature": 1, "seed": 3, "min_p": 0.2}),
    ({"extra_body": {"repetition_penalty": 1.5}}, {"repetition_penalty": 1.5}),
    ({"presence_penalty": 2, "frequency_penalty": 1.5}, {"presence_penalty": 2, "frequency_penalty": 1.5}),
    ({"logit_bias": {"40": 100}}, {"logit_bias": {40: 100}}),
    ({"max_tokens": 3}, {"max_new_tokens": 3}),
    ({"max_tokens": None, "max_completion_tokens": 5}, {"max_new_tokens": 5}),
    ({"extra_body": {"ignore_eos": True}, "max_tokens": 40}, {"ignore_eos": True, "max_new_tokens": 40}),
    (
        {"extra_body": {"response_format": {"type": "regex", "regex": "[a-c]{3}[0-9]"}}, "temperature": 1, "seed": 1},
        {"grammar": Grammar.regex("[a-c]{3}[0-9]"), "temperature": 1, "seed": 1},
    ),
]


@pytest.mark.parametrize(("asked", "options"), OPTIONS, ids=" ".join)
def test_an_option_is_generates_own(asked, options, client, model):
    messages = about("hello there", PICTURE)
    expected = alone(model, messages, **options)
    (choice,) = ask(client, messages, **asked).choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    streamed, reason = "", None
    for chunk in ask(client, messages, stream=True, **asked):
        streamed += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    assert (streamed, reason) == (expected.text, expected.finish_reason)


def test_a_stop_string_is_left_out(client, model):
    messages = about("hello there", PICTURE)
    stop = next(letter for letter in alone(model, messages).text[2:] if letter.isprintable())
    expected = alone(model, messages, stop=stop)
    for asked in (stop, [stop, "never comes"]):
        (choice,) = ask(client, messages, stop=asked).choices
        assert choice.finish_reason == "stop"
        assert choice.message.content == expected.text
        assert stop not in choice.message.content


def test_several_choices_differ_by_their_seed(client, model):
    messages = about("hello", PICTURE)
    asked = {"n": 3, "seed": 5, "temperature": 1.0}
    expected = [alone(model, messages, temperature=1.0, seed=5 + i).text for i in range(3)]
    answer = ask(client, messages, **asked)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == expected
    streamed = ["", "", ""]
    for chunk in ask(client, messages, stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == expected


def test_log_probabilities(client, model):
    messages = about("hello there", PICTURE)
    expected = alone(model, messages, logprobs=2).logprobs
    (choice,) = ask(client, messages, logprobs=True, top_logprobs=2).choices
    content = choice.logprobs.content
    ends = model.config.eos_token_ids
    expected = [one for one in expected if one.token_id not in ends]
    assert [one.logprob for one in content] == pytest.approx([one.logprob for one in expected], abs=1e-4)
    assert [len(one.top_logprobs) for one in content] == [2] * len(expected)
    assert all(one.top_logprobs[0].token == one.token for one in content)
    assert b"".join(bytes(one.bytes) for one in content).decode(errors="replace") == choice.message.content
    streamed = []
    for chunk in ask(client, messages, logprobs=True, top_logprobs=2, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == content
    assert ask(client, messages).choices[0].logprobs is None


def test_the_usage_of_a_stream(client):
    chunks = list(ask(client, about("hello"), stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_json_answers(client):
    formats = {
        "json_object": {"type": "json_object"},
        "json_schema": {"type": "json_schema", "json_schema": {"name": "d", "schema": SCHEMA, "strict": True}},
    }
    for kind, form in formats.items():
        answer = ask(client, about("hello"), response_format=form, max_tokens=400, temperature=1, seed=1)
        text = answer.choices[0].message.content
        assert text.lstrip().startswith("{")
        if answer.choices[0].finish_reason == "stop":
            value = json.loads(text)
            assert kind == "json_object" or re.fullmatch("[0-9]", str(value["digit"]))


def test_completions_take_the_prompt_as_it_is(client, model):
    (one,) = model.generate({"prompt": "hello there"}, max_new_tokens=8)
    (two,) = model.generate({"prompt": "the"}, max_new_tokens=8)
    answer = client.completions.create(model="tiny", prompt=["hello there", "the"], max_tokens=8, temperature=0)
    assert [choice.text for choice in answer.choices] == [one.text, two.text]
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens + two.usage.prompt_tokens
    streamed = ["", ""]
    asked = {"prompt": ["hello there", "the"], "max_tokens": 8, "temperature": 0}
    for chunk in client.completions.create(model="tiny", stream=True, **asked):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [one.text, two.text]
    told = client.completions.create(model="tiny", logprobs=1, **asked).choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == len(told.top_logprobs)
    assert told.text_offset[0] == 0
    assert client.completions.create(model="tiny", prompt="hello").usage.completion_tokens <= 16


def test_no_room_for_an_answer_is_an_empty_answer(client):
    (choice,) = ask(client, about("hello"), max_tokens=0).choices
    assert (choice.message.content, choice.finish_reason) == ("", "length")


def said(item):
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, item]}]}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"extra_body": {"tools": []}}, "'tools' is not supported"),
        ({"extra_body": {"messages": [{"role": "tool", "content": "x"}]}}, "role"),
        ({"extra_body": {"n": "two"}}, "n: "),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream=true"),
        ({"top_logprobs": 2}, "logprobs=true"),
        ({"logit_bias": {"99999": 1}}, "names the token 99999"),
        ({"n": 9}, "9 answers"),
        ({"stop": "x" * 257}, "stop"),
        ({"extra_body": {"messages": [{"role": "user", "content": "x"}] * 4097}}, "4096"),
        ({"temperature": 1e300}, "temperature"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 7}}}}, "schema"),
        ({"extra_body": {"response_format": {"type": "regex", "regex": "("}}}, "regular expression"),
        ({"extra_body": {"response_format": {"type": "xml"}}}, "xml"),
        (
            {"extra_body": said({"type": "image_url", "image_url": "x"})},
            r"- messages\.0\.content\.1\.image_url: .* dictionary",
        ),
        ({"extra_body": said({"type": "text", "text": {"a": 1}})}, r"- messages\.0\.content\.1\.text: "),
        ({"extra_body": said({"type": "input_audio"})}, r"- messages\.0\.content\.1: Input tag 'input_audio'"),
        ({"extra_body": {"messages": [{"role": "user", "content": 5}]}}, r"content: .* valid string or .* valid list"),
        ({"stop": ["a"] * 17}, "stop: List should have at most 16"),
        ({"extra_body": {"stop": {"a": 1}}}, r"- stop: .* valid string or .* valid list"),
        ({"extra_body": {"max_tokens": "x", "n": 0}}, "- max_tokens: (?!.* or )"),
        ({"stop": ["a", ""]}, "stop must be a string or several"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, dict) else "",
)
def test_what_is_not_served_is_refused_by_name(client, options, says):
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        ask(client, about("hello"), **options)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("options", [{"temperature": 1e-46}, {"temperature": 1, "top_p": 0}])
def test_as_good_as_greedy_is_greedy(client, options):
    assert ask(client, about("hello"), **options).choices[0].message == ask(client, about("hello")).choices[0].message


def test_a_negative_seed_repeats_an_answer(client):
    first, second = (ask(client, about("hello"), temperature=1, seed=-5).choices[0].message for _ in range(2))
    assert first == second


def test_cached_tokens_are_those_that_the_first_choice_found(model):
    with local(model) as server:
        many = ask(server.client(), about("never asked before"), n=2, temperature=1)
        assert many.usage.prompt_tokens_details.cached_tokens == 0


def test_stop_strings_of_a_client_make_no_tokenizers(client, model):
    options = {"response_format": {"type": "json_object"}, "max_tokens": 2}
    ask(client, about("hello"), **options)
    before = len(grammar._tokenizers[model.tokenizer])
    ask(client, about("hello"), stop=["<image>"], **options)
    assert len(grammar._tokenizers[model.tokenizer]) == before


def test_another_model_is_not_there(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="another", messages=about("hello"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
