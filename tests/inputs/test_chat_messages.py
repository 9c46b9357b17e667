"""Messages: what is accepted, what is refused and how, and the images found in them."""

import pytest

from llava_fast.errors import RequestError
from llava_fast.inputs.chat.messages import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    messages_from_conversations,
    normalise_messages,
    with_response_format,
)
from llava_fast.inputs.chat.rendering import builtin_template


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def test_normalise_lists_images_in_reading_order():
    data_uri = "data:image/png;base64,AAAA"
    array = object()
    messages = [
        system("S"),
        user(
            [
                {"type": "image_url", "image_url": {"url": data_uri, "detail": "high"}},
                text("then <image> and"),
                {"type": "image_url", "image_url": "dir/cat.png"},
                IMAGE,
                {"type": "image", "image": array},
                {"type": "video"},
            ]
        ),
        assistant("ok"),
        user("and <image>"),
    ]
    normal, sources = normalise_messages(messages)
    assert sources == [data_uri, None, "dir/cat.png", None, array, None]
    assert normal == [
        {"role": "system", "content": [text("S")]},
        {
            "role": "user",
            "content": [IMAGE, text("then <image> and"), IMAGE, IMAGE, IMAGE, {"type": "video"}],
        },
        {"role": "assistant", "content": [text("ok")]},
        {"role": "user", "content": [text("and <image>")]},
    ]
    assert normalise_messages(normal) == (normal, [None] * 6)
    prompt = builtin_template("mistral").render(messages)
    assert prompt.count(IMAGE_PLACEHOLDER) == len(sources)
    assert prompt.count(VIDEO_PLACEHOLDER) == 1


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty list"),
        ("Hi", "non-empty list"),
        ({"role": "user", "content": "Hi"}, "non-empty list"),
        (["Hi"], r"message 0 .*'user'"),
        ([{"role": "tool", "content": "x"}], "message 0 has the role 'tool'"),
        ([user("a"), system("b")], r"message 1 \(system\).*first"),
        ([assistant("a")], r"message 0 \(assistant\)"),
        ([system("s"), assistant("a")], r"message 1 \(assistant\)"),
        ([user("a"), assistant("b"), assistant("c")], r"message 2 \(assistant\)"),
        ([user("a"), user("b")], r"message 1 \(user\).*merge"),
        ([system("s")], "add a user message"),
        ([user("")], r"message 0 \(user\) is empty"),
        ([user([])], r"message 0 \(user\) is empty"),
        ([user(None)], r"message 0 \(user\): content"),
        ([user([{"type": "audio"}])], r"message 0 \(user\).*'audio'.*'image_url'"),
        ([user(["Hi"])], r"message 0 \(user\).*type None"),
        ([user([{"type": "text"}])], r"message 0 \(user\).*'text'"),
        ([user([{"type": "image_url"}])], r"message 0 \(user\).*image_url"),
        ([user("a"), assistant([IMAGE])], r"message 1 \(assistant\).*user message"),
        ([user([{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}])], "download it first"),
        ([user([{"type": "image_url", "image_url": "HTTP://a.b/c.png"}])], "download it first"),
        ([user([{"type": "image", "url": "http://a.b/c.png"}])], "http://a.b/c.png.*download it first"),
    ],
)
def test_bad_messages_name_the_message_and_the_remedy(messages, words):
    with pytest.raises(RequestError, match=words):
        normalise_messages(messages)


def test_conversations_become_messages():
    conversations = [
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": "A <b>cat</b>."},
        {"from": "human", "value": "<image> and <image>?"},
        {"from": "gpt", "value": "No."},
    ]
    messages = messages_from_conversations(conversations)
    assert messages == [
        user("<image>\nWhat is it?"),
        assistant("A <b>cat</b>."),
        user("<image> and <image>?"),
        assistant("No."),
    ]
    assert messages_from_conversations(conversations, image_first=False)[0] == user("What is it?\n<image>")
    assert messages_from_conversations([{"from": "human", "value": " <image> "}]) == [user("<image>")]
    assert messages_from_conversations([{"from": "gpt", "value": "Hi"}, *conversations]) == messages
    assert messages_from_conversations([user("a"), assistant("b")]) == [user("a"), assistant("b")]
    assert normalise_messages(messages)[1] == [None, None, None]


@pytest.mark.parametrize(
    ("conversations", "words"),
    [
        ([{"from": "bot", "value": "a"}], r"conversations\[0\] is from 'bot'"),
        ([{"value": "a"}], r"conversations\[0\] is from None"),
        ([{"from": "human", "value": None}], r"conversations\[0\] \(human\)"),
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], r"conversations\[1\].*'human'"),
        ([{"from": "gpt", "value": "a"}], "no turn from 'human'"),
        ([], "no turn from 'human'"),
    ],
)
def test_bad_conversations_name_the_turn(conversations, words):
    with pytest.raises(RequestError, match=words):
        messages_from_conversations(conversations)


def test_response_formats_of_llava_1_5():
    assert with_response_format("Which?", "short") == ("Which?\nAnswer the question using a single word or phrase.")
    assert with_response_format("Which?\nA. 1\nB. 2", "option letter") == (
        "Which?\nA. 1\nB. 2\nAnswer with the option's letter from the given choices directly."
    )
    with pytest.raises(RequestError, match="'short', 'option letter'"):
        with_response_format("Which?", "long")
