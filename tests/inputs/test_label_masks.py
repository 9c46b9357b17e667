"""Label masks of every template on generated conversations: each answer with its end, and nothing else; and what the
original trainers supervise, against their rule written down again here."""

import dataclasses
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fast.errors import RequestError
from llava_fast.inputs.chat.formats import TURN_FORMATS
from llava_fast.inputs.chat.rendering import builtin_template, checkpoint_template
from llava_fast.inputs.encoding import ORIGINAL_IMAGE_TOKEN
from llava_fast.inputs.plan.plan import TextPiece
from llava_fast.inputs.processor import Processor
from tests.support import tiny
from tests.support.real_tokenizers import (
    LLAMA_3_SPECIAL,
    QWEN_SPECIAL,
    TOKENIZERS,
    llama_3_tokenizer,
    llama_tokenizer,
    qwen_tokenizer,
)

# What stands between the generation prompt and an answer, and between the answer and the next turn: by hand.
AROUND = {
    "plain": ("", "\n"),
    "vicuna_v1": (" ", "</s>"),
    "llava_v1": (" ", "</s>"),
    "llama_2": (" ", " </s>"),
    "llava_llama_2": (" ", " </s>"),
    "mistral": (" ", " </s>"),
    "chatml_direct": ("", "<|im_end|>"),
    "llava_llama_3": ("", "<|eot_id|>"),
    "slime_llama_3": ("", "<|eot_id|>"),
    "qwen": ("", "<|im_end|>"),
    "blip2": (" ", "\n"),
    "instructblip": (" ", "</s>"),
    "xcomposer": (" ", "<TOKENS_UNUSED_1>"),
    "qwen_vl": ("", "<|im_end|>"),
    "qwen_vl_raw": ("", "<|endoftext|>"),
    "monkey": ("", "<|endoftext|>"),
}
OPENING = {
    "plain": "",
    "vicuna_v1": "ASSISTANT:",
    "llava_v1": "ASSISTANT:",
    "llama_2": "[/INST]",
    "llava_llama_2": "[/INST]",
    "mistral": "[/INST]",
    "chatml_direct": "<|im_start|>assistant\n",
    "llava_llama_3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "slime_llama_3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen": "<|im_start|>assistant\n",
    "blip2": "Answer:",
    "instructblip": "",
    "xcomposer": " <|Bot|>:",
    "qwen_vl": "<|im_start|>assistant\n",
    "qwen_vl_raw": "",
    "monkey": " Answer: ",
}
BARE = ("instructblip", "qwen_vl_raw")
CUT = [each.name for each in TURN_FORMATS if each.cuts]  # for a tokenizer that puts no space before a text
WORDS = [
    "the",
    "a",
    "hello",
    "He",
    "42",
    "é",
    "中文",
    "🐈\u200d⬛",
    "e\u0301",
    "\u00a0",
    "'s",
    "!",
    "ASSISTANT:",
    "USER: ",
]
WORDS += ["[/INST]", "<<SYS>>", "assistant\n", " ", "  ", "\n", "\n\n", "\t", "\r\n"]
MARKERS = ["</s>", "<|im_end|>", "<|im_start|>", "<|eot_id|>"]


def texts(words: list[str], least: int = 0) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(words), min_size=least, max_size=6).map("".join)


@st.composite
def conversations(draw, words: list[str], images: bool = True, plain: bool = False, bare: bool = False) -> list[dict]:
    """Messages with an answer to each question, one of them at least with text; images anywhere in questions. bare:
    each question ends in a mark, for a template with nothing else between it and its answer."""
    marked = [*words, "<image>", "<image>\n"] if images else words
    if plain:
        turns = [(draw(texts(marked)) + "<image>", draw(texts(words, 1)))]
    else:
        turns = draw(st.lists(st.tuples(texts(marked, 1), texts(words)), min_size=1, max_size=4))
        if not any(answer for _, answer in turns):
            turns.append(("more", "yes"))
    messages = [] if plain or draw(st.booleans()) else [{"role": "system", "content": draw(texts(words))}]
    for asked, answer in turns:
        question = f"{asked}?" if bare else asked
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def processor_for(template: str, tokenizer, image_token: int | None = None) -> Processor:
    token = tokenizer.convert_tokens_to_ids("<image>") if image_token is None else image_token
    return Processor(tiny.pair("next").ours.processor.geometry, tokenizer, token, builtin_template(template))


def masked(processor: Processor, messages: list[dict], labels) -> tuple[list[int], list[bool]]:
    """Ids and labels of the whole sequence, an image being the one id `image_token_id`."""
    images = sum(message["content"].count("<image>") for message in messages)
    ids: list[int] = []
    flags: list[bool] = []
    for part in processor.outline({"messages": messages, "images": ["not opened"] * images}, labels):
        text = isinstance(part, TextPiece)
        ids += part.ids.tolist() if text else [processor.image_token_id]
        flags += part.supervised.tolist() if text else [False]
    return ids, flags


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.backend_tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=False)


def runs(tokenizer, ids: list[int], flags: list[bool]) -> list[tuple[bool, str]]:
    """The text of each run of tokens with, or without, a label."""
    grouped = groupby(zip(flags, ids, strict=True), key=lambda pair: pair[0])
    return [(flag, decode(tokenizer, [i for _, i in pairs])) for flag, pairs in grouped]


def answers_of(messages: list[dict], template: str) -> list[str]:
    before, after = AROUND[template]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    answers = [a.strip() for a in answers] if template == "llava_llama_3" else answers
    return [before + answer + after for answer in answers]


def test_every_template_is_here():
    assert sorted(AROUND) == sorted(OPENING) == sorted(each.name for each in TURN_FORMATS)


@pytest.mark.parametrize("image_token", [None, ORIGINAL_IMAGE_TOKEN])
@pytest.mark.parametrize("kind", ["bytes", "bytes without bos"])
@pytest.mark.parametrize("template", AROUND)
def test_each_answer_and_its_end_and_nothing_else(template, kind, image_token):
    tokenizer = TOKENIZERS[kind]()
    processor = processor_for(template, tokenizer, image_token)

    @settings(max_examples=25)
    @given(conversations(WORDS + MARKERS, plain=template == "plain", bare=template in BARE))
    def check(messages):
        ids, flags = masked(processor, messages, "answers")
        found = runs(tokenizer, ids, flags)
        assert [text for flag, text in found if flag] == answers_of(messages, template)
        before = [text for flag, text in found if not flag][: len(answers_of(messages, template))]
        assert all(text.endswith(OPENING[template]) for text in before)
        assert (ids, flags) == masked(processor, messages, True)
        assert ids == masked(processor, messages, "original")[0]

    check()


@pytest.mark.parametrize("image_token", [None, ORIGINAL_IMAGE_TOKEN])
@pytest.mark.parametrize("every_piece", [False, True])
@pytest.mark.parametrize("template", sorted(AROUND.keys() - CUT))
def test_each_answer_with_sentencepieces_spaces(template, every_piece, image_token):
    """The space that SentencePiece puts before a piece is no character of the text, so it is no part of a span."""
    tokenizer = llama_tokenizer(every_piece)
    processor = processor_for(template, tokenizer, image_token)

    @settings(max_examples=25)
    @given(conversations(WORDS, plain=template == "plain", bare=template in BARE))
    def check(messages):
        ids, flags = masked(processor, messages, "answers")
        supervised = [text for flag, text in runs(tokenizer, ids, flags) if flag]
        expected = answers_of(messages, template)
        own = [f" {answer}" for answer in expected]  # SentencePiece may put one between plain's placeholder and answer
        assert supervised == expected or (template == "plain" and supervised == own)

    check()


def test_a_token_across_the_generation_prompt_and_the_answer_counts_as_the_answers():
    tokenizer = qwen_tokenizer()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nthe"}]
    ids, flags = masked(processor_for("qwen", tokenizer), messages, "answers")
    assert [text for flag, text in runs(tokenizer, ids, flags) if flag] == ["\n\nthe<|im_end|>"]


# ---------------------------------------------------------------- what the original trainers supervise


def original_rule(tokenizer, turns: list[tuple[str, str]], always: list[int]) -> tuple[list[int], list[bool]]:
    """LLaVA-NeXT's preprocess_qwen and preprocess_llama3: every turn is tokenised alone; the assistant's are labels
    throughout, the others not, and then every id of `always` is, wherever it stands. turns: (role, rendered)."""
    ids: list[int] = []
    target: list[int] = []
    for role, text in turns:
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += encoded
        target += encoded if role == "assistant" else [-100] * len(encoded)
    for place, token in enumerate(ids):
        if token in always:
            target[place] = token
    return ids, [label != -100 for label in target]


def qwen_turns(messages: list[dict]) -> list[tuple[str, str]]:
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    return [(m["role"], f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n") for m in messages]


def llama_3_turns(messages: list[dict]) -> list[tuple[str, str]]:
    if messages[0]["role"] != "system":
        prompt = (
            "You are a helpful language and vision assistant. You are able to understand the visual content that the "
            "user provides, and assist the user with a variety of tasks using natural language."
        )
        messages = [{"role": "system", "content": prompt}, *messages]
    header = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    return [("start", "<|begin_of_text|>")] + [
        (m["role"], header.format(m["role"], m["content"].strip())) for m in messages
    ]


def no_empty_system(messages: list[dict]) -> bool:
    """An empty system prompt is left out here, and written as an empty turn there."""
    return messages[0]["role"] != "system" or bool(messages[0]["content"].strip())


@pytest.mark.parametrize("image_token", [None, ORIGINAL_IMAGE_TOKEN])
@pytest.mark.parametrize("template", ["qwen", "llava_llama_3"])
def test_original_is_the_original_trainers_rule(template, image_token):
    qwen = template == "qwen"
    tokenizer = qwen_tokenizer() if qwen else llama_3_tokenizer()
    always = [tokenizer.convert_tokens_to_ids(t) for t in ([*QWEN_SPECIAL[1:3], "Ċ"] if qwen else LLAMA_3_SPECIAL[:4])]
    image = tokenizer.convert_tokens_to_ids("<image>")
    processor = processor_for(template, tokenizer, image_token)
    markers = ["<|im_end|>", "<|im_start|>"] if qwen else ["<|eot_id|>"]
    seen = []

    @settings(max_examples=60)
    @given(conversations(WORDS + markers).filter(no_empty_system))
    def check(messages):
        ids, flags = masked(processor, messages, "original")
        expected_ids, expected = original_rule(tokenizer, (qwen_turns if qwen else llama_3_turns)(messages), always)
        assert ids == [processor.image_token_id if i == image else i for i in expected_ids]
        assert flags == expected
        answers = masked(processor, messages, "answers")[1]
        assert all(original for original, answer in zip(flags, answers, strict=True) if answer)
        seen.append(sum(flags) > sum(answers))

    check()
    assert all(seen)  # the headers at least


def test_original_by_hand():
    tokenizer = qwen_tokenizer()
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "<image>\na\nb\n\nc"},
        {"role": "assistant", "content": "the"},
    ]
    for image_token in (None, ORIGINAL_IMAGE_TOKEN):
        ids, flags = masked(processor_for("qwen", tokenizer, image_token), messages, "original")
        found = runs(tokenizer, ids, flags)
        image = "<image>" if image_token is None else ""
        assert found == [
            (True, "<|im_start|>"),
            (False, "system"),
            (True, "\n"),
            (False, "S"),
            (True, "<|im_end|>\n<|im_start|>"),
            (False, "user"),
            (True, "\n"),
            (False, image),
            (True, "\n"),
            (False, "a"),
            (True, "\n"),
            (False, "b\n\nc"),  # "\n\n" is another token
            (True, "<|im_end|>\n<|im_start|>assistant\nthe<|im_end|>\n"),
        ]


@pytest.mark.parametrize("template", [name for name in AROUND if name not in ("qwen", "qwen_vl", "llava_llama_3")])
def test_original_is_the_answers_elsewhere(template):
    processor = processor_for(template, tiny.tokenizer())

    @settings(max_examples=20)
    @given(conversations(WORDS, plain=template == "plain", bare=template in BARE))
    def check(messages):
        assert masked(processor, messages, "original") == masked(processor, messages, "answers")

    check()


def test_a_label_token_that_the_tokenizer_lacks_labels_nothing_else():
    """Qwen's markers with Llama's tokenizer: its unknown token and its single bytes are no label tokens."""
    tokenizer = llama_tokenizer(True)
    ends, starts, turn_ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<|eot_id|>"])
    assert processor_for("qwen", tokenizer)._original_label_ids == [starts, ends]  # "\n" is "▁" and a byte there
    assert processor_for("llava_llama_3", tokenizer)._original_label_ids == [turn_ends]


# ---------------------------------------------------------------- samples that cannot be masked


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


UNSTABLE = (
    "{{ messages | length }}{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("labels", ["answers", "original"])
@pytest.mark.parametrize(
    ("messages", "template", "reason"),
    [
        (turns("a"), None, "nothing to learn from"),
        (turns("a", "", "b", ""), None, "nothing to learn from"),
        (turns("", "b"), None, r"message 0 \(user\) is empty"),
        (turns("a", "b"), checkpoint_template(UNSTABLE, {}), "not prefix-stable"),
        (turns("a", "b"), checkpoint_template("{{ 'x' if messages else '' }}", {}), "nothing to learn from"),
        (turns("a", "b", "c", "d"), "plain", "takes one user message with an image"),
    ],
)
def test_a_sample_that_cannot_be_masked_is_refused_by_its_name(messages, template, reason, labels):
    processor = tiny.pair("next").ours.processor
    if template is not None:
        template = builtin_template(template) if isinstance(template, str) else template
        processor = dataclasses.replace(processor, template=template)
    with pytest.raises(RequestError, match=f"^request sample-7: .*{reason}"):
        processor.prepare([{"messages": messages, "id": "sample-7"}], labels=labels)


def test_of_several_answers_some_may_be_empty():
    tokenizer = tiny.tokenizer()
    ids, flags = masked(processor_for("vicuna_v1", tokenizer), turns("a", "", "b", "the"), "answers")
    assert [text for flag, text in runs(tokenizer, ids, flags) if flag] == [" </s>", " the</s>"]


def test_labels_of_another_name_are_an_error():
    with pytest.raises(ValueError, match="not 'all'"):
        tiny.pair("next").ours.processor.prepare([{"messages": turns("a", "b")}], labels="all")


def test_the_plan_carries_original_labels():
    processor = processor_for("qwen", qwen_tokenizer())
    plan = processor.prepare([{"messages": turns("a", "b")}], labels="original").plan
    _, flags = masked(processor, turns("a", "b"), "original")
    assert flags[0]
    assert plan.column("supervised_row").tolist() == [i - 1 for i in np.flatnonzero(flags) if i]
