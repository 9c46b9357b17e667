"""Chats: every turn answers what a fresh request with the whole conversation would, and encodes only what is new."""

import dataclasses

import pytest

from llava_fast.errors import ImageError, LlavaFastError, RequestError
from llava_fast.generation import scheduler
from llava_fast.models import paged_cache
from tests.support import tiny

PICTURES = [tiny.picture(60, 90, seed) for seed in range(4)]
TURNS = [
    ("what is this?", PICTURES[:1]),
    ("and a longer question about it, the hello", []),
    ("compare with these", PICTURES[1:3]),
    ("why?", []),
    ("é 日本?", [PICTURES[3]]),
    ("the end", []),
]
NAMES = ["next", "next_mistral_window", "next_llama3", "llava15", "onevision", "onevision_window", "video"]
OPTIONS = {"max_new_tokens": 10}


def encoded(model, monkeypatch) -> list[int]:
    """A growing list of how many tiles each call of the tower had."""
    calls = []
    forward = model.vision_tower.forward
    monkeypatch.setattr(
        model.vision_tower, "forward", lambda tiles, **how: calls.append(len(tiles)) or forward(tiles, **how)
    )
    return calls


def fresh_answer(model, chat, images, **options):
    """What a request with the conversation before the last answer gives."""
    history = {"messages": chat.messages[:-1], "images": list(images)}
    return model.generate([history], **OPTIONS, **options)[0]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", NAMES)
def test_every_turn_is_what_a_fresh_request_gives(name, system):
    model = tiny.pair(name).ours
    chat, images = model.chat(system=system), []
    for text, pictures in TURNS:
        images += pictures
        answer = chat.send(text, images=pictures, **OPTIONS)
        assert answer == fresh_answer(model, chat, images)
        assert chat.messages[-1] == {"role": "assistant", "content": answer.text}
    assert len(chat.messages) == 2 * len(TURNS) + (system is not None)


def test_an_image_is_encoded_once(monkeypatch):
    model = tiny.pair("next").ours
    calls, chat, counts = encoded(model, monkeypatch), model.chat(), []
    for text, pictures in TURNS:
        before = len(calls)
        chat.send(text, images=pictures, **OPTIONS)
        counts.append(sum(calls[before:]))
    each = [len(model.processor.tiles(picture)) for picture in PICTURES]
    assert counts == [each[0], 0, each[1] + each[2], 0, each[3], 0]


def test_onevisions_first_image_is_encoded_anew_once_it_is_one_of_several(monkeypatch):
    """Alone it is tiled; among others it is one padded square."""
    model = tiny.pair("onevision").ours
    calls, chat = encoded(model, monkeypatch), model.chat()
    chat.send("one", images=PICTURES[:1], **OPTIONS)
    chat.send("more", images=PICTURES[1:2], **OPTIONS)
    chat.send("and", images=PICTURES[2:3], **OPTIONS)
    assert calls == [len(model.processor.tiles(PICTURES[0])), 2, 1]


def test_dynamic_rope_beyond_its_first_length():
    """Its frequencies follow the length, so rows cached at another length cannot be used again."""
    model = tiny.pair("next_dynamic_rope").ours
    chat, images = model.chat(), []
    for text, pictures in [("a", PICTURES[:1]), ("b", []), ("c", [])]:
        images += pictures
        answer = chat.send(text, images=pictures, **OPTIONS)
        assert answer == fresh_answer(model, chat, images)
    assert answer.usage.prompt_tokens > model.config.decoder.max_positions


def test_a_chat_of_many_turns_outgrows_its_cache_unharmed(monkeypatch):
    monkeypatch.setattr(paged_cache, "SMALLEST_SEGMENT", 1)  # memory is taken in small pieces, as by a large model
    model = tiny.pair("next_mistral_window").ours
    chat, capacities = model.chat(), []
    for turn in range(14):
        pictures = PICTURES[:1] if turn in (0, 7) else []
        answer = chat.send(f"turn {turn}", images=pictures, **OPTIONS)
        capacities.append(chat._scheduler.cache.blocks)
    assert answer == fresh_answer(model, chat, [PICTURES[0], PICTURES[0]])
    assert capacities == sorted(capacities)
    assert 1 < len(set(capacities)) < 8


def test_a_context_that_is_full_is_refused_and_the_chat_goes_on():
    model = tiny.pair("next_dynamic_rope").ours  # a context of 384
    chat, sent = model.chat(), 0
    with pytest.raises(RequestError, match="context"):  # noqa: PT012 one of these messages is too much
        for sent in range(100):  # noqa: B007
            chat.send("a question of some length?", **OPTIONS)
    assert 1 <= sent < 20
    assert len(chat.messages) == 2 * sent
    chat.reset()
    assert chat.messages == []
    assert chat.send("a", **OPTIONS) == model.chat().send("a", **OPTIONS)


WRONG = [
    (("x",), {"images": [b"no image"]}, ImageError),
    (("x",), {"images": "a.png"}, RequestError),
    (("x",), {"images": PICTURES[0]}, RequestError),
    (("x",), {"images": [None]}, LlavaFastError),
    (("x",), {"images": ["/no/such.png"]}, ImageError),
    (("<image>",), {}, RequestError),
    (("",), {}, RequestError),
    (("x" * 10_000,), {}, RequestError),
    (("x",), {"temperature": -1}, RequestError),
    (("x",), {"seed": "a"}, RequestError),
    (("\ud800",), {}, RequestError),
]


def test_a_turn_that_fails_changes_nothing():
    model = tiny.pair("next").ours
    chat, twin = model.chat(), model.chat()
    for each in (chat, twin):
        each.send("look", images=PICTURES[:1], **OPTIONS)
    for args, options, kind in WRONG:
        before = list(chat.messages)
        with pytest.raises(kind):
            chat.send(*args, **{**OPTIONS, **options})
        assert chat.messages == before
    assert chat.send("and?", **OPTIONS) == twin.send("and?", **OPTIONS)


@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_turn_that_breaks_off_while_answering_changes_nothing(monkeypatch, step):
    """As with Ctrl-C. The rows it wrote are forgotten, whatever is asked next."""
    model = tiny.pair("next").ours
    chat, twin = model.chat(), model.chat()
    for each in (chat, twin):
        each.send("look", images=PICTURES[:1], **OPTIONS)
    choose, calls = scheduler.choose, []

    def interrupted(logits, running):
        calls.append(1)
        if len(calls) > step:
            raise KeyboardInterrupt
        return choose(logits, running)

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "choose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.send("a question that is never answered", images=PICTURES[1:2], **OPTIONS)
    assert chat.messages == twin.messages
    for text, pictures in (("another", PICTURES[2:3]), ("one more", [])):
        assert chat.send(text, images=pictures, **OPTIONS) == twin.send(text, images=pictures, **OPTIONS)


def test_an_empty_answer_does_not_end_the_conversation():
    model = tiny.pair("next").ours
    chat = model.chat()
    first = chat.send("hello", max_new_tokens=1, ignore_eos=True)
    chat.reset()
    silent = chat.send("hello", max_new_tokens=0)
    assert (silent.text, silent.finish_reason) == ("", "length")
    assert first.token_ids
    answer = chat.send("still there?", **OPTIONS)
    assert answer == fresh_answer(model, chat, [])


def test_an_answer_cut_by_a_stop_string_continues_from_its_text():
    model = tiny.pair("next").ours
    chat = model.chat()
    full = chat.send("hello there", **OPTIONS).text
    stop = next(full[i : i + 2] for i in range(2, len(full)) if "\ufffd" not in full[i : i + 2])
    chat.reset()
    cut = chat.send("hello there", stop=stop, **OPTIONS)
    assert cut.finish_reason == "stop"
    assert cut.text == full[: full.find(stop)]
    assert chat.send("go on", **OPTIONS) == fresh_answer(model, chat, [])


def test_draws_and_penalties_are_those_of_a_fresh_request():
    model = tiny.pair("next").ours
    chat = model.chat()
    options = {"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 11}
    chat.send("look", images=PICTURES[:1], **OPTIONS)
    answer = chat.send("and?", **OPTIONS, **options)
    assert answer == fresh_answer(model, chat, PICTURES[:1], **options)


def test_the_same_picture_twice_is_two_pictures(monkeypatch):
    model = tiny.pair("next").ours
    calls, chat = encoded(model, monkeypatch), model.chat()
    chat.send("a", images=[PICTURES[0], PICTURES[0]], **OPTIONS)
    answer = chat.send("b", images=[PICTURES[0]], **OPTIONS)
    assert len(calls) == 2
    assert answer == fresh_answer(model, chat, [PICTURES[0]] * 3)


def test_original_checkpoints_chat_too():
    """Their text is tokenised in chunks, so a turn's pieces must still line up with the cache."""
    from llava_fast.inputs.encoding import ORIGINAL_IMAGE_TOKEN

    model = tiny.pair("next").ours
    processor, config = model.processor, model.config
    try:
        model.processor = dataclasses.replace(processor, image_token_id=ORIGINAL_IMAGE_TOKEN)
        model.config = dataclasses.replace(config, image_token_id=ORIGINAL_IMAGE_TOKEN)
        chat, images = model.chat(), []
        for text, pictures in TURNS:
            images += pictures
            answer = chat.send(text, images=pictures, repetition_penalty=1.1, **OPTIONS)
            assert answer == fresh_answer(model, chat, images, repetition_penalty=1.1)
    finally:
        model.processor, model.config = processor, config
