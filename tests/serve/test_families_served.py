"""Every row of docs/families.md behind the server: its answer about a picture is the one that generate gives, alone and
beside a question without one."""

import concurrent.futures

import pytest

import llava_fast
from tests.checkpoints import test_llama_vid, test_llava_uhd, test_xcomposer
from tests.serve.conftest import about, ask, data_uri, local, png
from tests.support import qwen_vl, slimes, tiny
from tests.support.families_page import cases, families

WRITERS = {
    "llava_uhd": test_llava_uhd.write,
    "slime": slimes.write,
    "InternLMXComposer": test_xcomposer.write,
    "llama_vid": test_llama_vid.write,
}


def model_of(family, folder):
    """A tiny model of a family, from a checkpoint in its own layout."""
    if family.model_types[0] in WRITERS:
        WRITERS[family.model_types[0]](folder)
        return llava_fast.load(folder)
    if family.model_types[0] in ("qwen", "monkey"):
        qwen_vl.write(folder, family.model_types[0] == "monkey")
        return llava_fast.load(folder)
    if family.layout == "original":
        llava_fast.save(tiny.pair("next").ours, folder, layout="original")
        return llava_fast.load(folder)
    return tiny.pair(cases(family)[0]).ours


@pytest.mark.parametrize("family", families(), ids=lambda family: family.model_types[0])
def test_it_is_served(family, tmp_path):
    answers_are_generates(model_of(family, tmp_path))


@pytest.mark.parametrize("name", ["blip2_t5", "instructblip_t5"])
def test_an_encoder_decoder_is_served(name):
    answers_are_generates(tiny.pair(name).ours)


def answers_are_generates(model):
    seen, read = about("what is it?", data_uri(png(40, 90))), about("hello")
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    requests = [
        {"messages": [{"role": "user", "content": content}], "images": [png(40, 90)]},
        {"messages": [{"role": "user", "content": "hello"}]},
    ]
    expected = model.generate(requests, max_new_tokens=6)
    with local(model) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        client = server.client()
        answers = list(pool.map(lambda messages: ask(client, messages, max_tokens=6), (seen, read)))
    for answer, alone in zip(answers, expected, strict=True):
        assert answer.choices[0].message.content == alone.text
    assert answers[0].usage.prompt_tokens > answers[1].usage.prompt_tokens
