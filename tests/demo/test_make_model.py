"""The untrained demo directory: its tokenizer, its chat template, and that transformers computes the same from it."""

import numpy as np
import pytest
import torch

import llava_fast
from llava_fast.demo import PHRASINGS, answer, compose, split_scans

make_model = pytest.importorskip("make_model")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits")
    make_model.make_model(path, seed=0)
    return path


@pytest.fixture(scope="module")
def processor(directory):
    from transformers import LlavaNextProcessor

    return LlavaNextProcessor.from_pretrained(directory)


def turns(text, reply=None):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    return messages + ([] if reply is None else [{"role": "assistant", "content": reply}])


def test_each_digit_of_an_answer_is_one_token(processor):
    tokenizer = processor.tokenizer
    assert len(tokenizer) < 512
    ids = tokenizer(f" {answer('read', list(range(10)))}", add_special_tokens=False).input_ids
    assert len(set(ids)) == 10
    assert len(ids) == 10
    for text in sum(PHRASINGS.values(), ()):
        assert len(tokenizer(f" {text}", add_special_tokens=False).input_ids) == len(text.split()) + 1  # and the mark


def test_unknown_text_is_kept_as_bytes(processor):
    text = "Grüße, 42 € — 数字?"
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert processor.tokenizer.decode(ids) == text


def test_the_prompt_is_a_prefix_of_the_text_with_its_answer(processor):
    asked = processor.apply_chat_template(turns("Read the digits."), add_generation_prompt=True)
    answered = processor.apply_chat_template(turns("Read the digits.", "3 7"))
    assert asked == "USER: <image>\nRead the digits. ASSISTANT:"
    assert answered == asked + " 3 7</s>"


def test_labels_are_the_answer_and_the_end_token(directory):
    model = llava_fast.load(directory, device="cpu")
    canvas = compose(np.random.default_rng(0), split_scans()[0], count=3)
    reply = answer("read", canvas.digits)
    request = {"messages": turns("Read the digits.", reply), "images": [canvas.image]}
    target = model.prepare([request], labels=True).column("supervised_target").tolist()
    expected = model.tokenizer(f" {reply}</s>", add_special_tokens=False).input_ids
    assert target == expected


@pytest.mark.parametrize("aspect", [1.0, 0.4, 2.0])
def test_transformers_gives_the_same_logits(directory, processor, aspect):
    from transformers import LlavaNextForConditionalGeneration

    theirs = LlavaNextForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    ours = llava_fast.load(directory, device="cpu")
    canvas = compose(np.random.default_rng(1), split_scans()[1], count=2, aspect=aspect)
    prompt = processor.apply_chat_template(turns("How many digits are there?"), add_generation_prompt=True)
    inputs = processor(images=canvas.image, text=prompt, return_tensors="pt")
    request = {"messages": turns("How many digits are there?"), "images": [canvas.image]}
    with torch.inference_mode():
        wanted = theirs(**inputs).logits[:, -1]
        given = ours(ours.prepare([request])).logits
    assert (given - wanted).abs().max() <= 1e-4 * wanted.abs().max()
