"""A checkpoint's own chat template: the text against transformers' apply_chat_template, the segments by hand."""

import pytest

from llava_fast.errors import CheckpointError, RequestError
from llava_fast.inputs.chat.rendering import Segment, builtin_template, checkpoint_template


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


# Each exercises another part of what apply_chat_template offers.
CHATML_ITEMS = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' }}\n"
    "    {%- for item in message['content'] %}\n"
    "        {%- if item['type'] == 'image' %}{{ '<image>\\n' }}{% elif item['type'] == 'text' %}"
    "{{ item['text'] }}{% endif %}\n"
    "    {%- endfor %}\n"
    "    {{- '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_3_TEXTS = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' }}"
    "{{ message.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
VICUNA_BLOCKS = (
    "{% for message in messages %}{{ message.role | upper + ': ' }}"
    "{% for item in message.content if item.type == 'image' %}<image>\n{{ '\n' }}{% endfor %}"
    "{% for item in message.content if item.type == 'text' %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ item.text + ' ' }}{% endgeneration %}"
    "{% else %}{{ item.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# A space after the role that the generation prompt lacks; only the block tells where the answer starts.
SPACED_BLOCKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' }}{% for item in message.content %}"
    "{% if item.type == 'image' %}<image>{% elif message.role == 'assistant' %}"
    "{% generation %}{{ '\n' + item.text }}{% endgeneration %}{% else %}{{ '\n' + item.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FEATURES = (
    "{% set ns = namespace(turns=0) %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% continue %}{% endif %}{% set ns.turns = ns.turns + 1 %}"
    "{% for item in message.content %}{{ (item.text or item.type) | tojson }}{% endfor %}"
    "{% endfor %}{{ ns.turns }}{{ strftime_now('%Y') | length }}{{ eos_token }}"
)
SPECIAL_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "</s>"}


def hugging_face_render(source, messages, add_generation_prompt):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL_TOKENS)
    tokenizer.chat_template = source
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("source", [CHATML_ITEMS, VICUNA_BLOCKS, SPACED_BLOCKS, FEATURES])
def test_items_render_as_transformers_does(source, add_generation_prompt):
    messages = [
        system([text("Be brief & kind <b>.")]),
        user([IMAGE, text("Was ist 这是?"), text(" \n🐈 ")]),
        assistant([text("Eine Katze")]),
        user([text("Why?")]),
    ]
    template = checkpoint_template(source, SPECIAL_TOKENS)
    rendered = template.render(messages, add_generation_prompt=add_generation_prompt)
    assert rendered == hugging_face_render(source, messages, add_generation_prompt)
    assert template.render(messages[1:], "Be brief & kind <b>.", add_generation_prompt) == rendered


def test_a_template_of_texts_gets_texts():
    messages = [system("S"), user(" Hi "), assistant("Hello"), user("Bye")]
    template = checkpoint_template(LLAMA_3_TEXTS, SPECIAL_TOKENS)
    assert template.render(messages) == hugging_face_render(LLAMA_3_TEXTS, messages, True)
    with_image = [user([IMAGE, text("What is it?")])]
    assert template.render(with_image, "S") == builtin_template("llava_llama_3").render(with_image, "S")


def test_checkpoint_segments_end_with_the_end_of_turn():
    template = checkpoint_template(CHATML_ITEMS, {"eos_token": "<|endoftext|>"})
    assert template.stop == ("<|im_end|>", "<|endoftext|>")
    messages = [user([IMAGE, text("Hi")]), assistant("im"), user("Bye"), assistant("Ciao <|im_end|> x")]
    assert template.segments(messages, add_generation_prompt=False) == [
        Segment("<|im_start|>user\n<image>\nHi<|im_end|>\n<|im_start|>assistant\n"),
        Segment("im<|im_end|>", True, True),
        Segment("\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"),
        Segment("Ciao <|im_end|> x<|im_end|>", True, True),
        Segment("\n"),
    ]
    assert template.segments(messages[:1]) == [Segment(template.render(messages[:1]))]


def test_checkpoint_segments_without_an_end_of_turn_or_with_blocks():
    messages = [user([IMAGE, text("Hi")]), assistant("user"), user("Bye")]
    assert checkpoint_template(VICUNA_BLOCKS, SPECIAL_TOKENS).segments(messages) == [
        Segment("USER: <image>\n\nHi ASSISTANT:"),
        Segment(" user ", True, True),
        Segment("USER: Bye ASSISTANT:"),
    ]
    assert checkpoint_template(SPACED_BLOCKS, SPECIAL_TOKENS).segments(messages) == [
        Segment("<|im_start|>user <image>\nHi<|im_end|><|im_start|>assistant "),
        Segment("\nuser<|im_end|>", True, True),
        Segment("<|im_start|>user \nBye<|im_end|><|im_start|>assistant\n"),
    ]
    without_generation_prompt = SPACED_BLOCKS.split("{% if add_generation_prompt")[0]
    assert checkpoint_template(without_generation_prompt, SPECIAL_TOKENS).segments(messages) == [
        Segment("<|im_start|>user <image>\nHi<|im_end|><|im_start|>assistant "),
        Segment("\nuser<|im_end|>", True, True),
        Segment("<|im_start|>user \nBye<|im_end|>"),
    ]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            SPACED_BLOCKS.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
            "opens the answer",
        ),
        ("{{ messages | length }}" + CHATML_ITEMS, "when more follows"),
    ],
)
def test_a_template_that_is_not_prefix_stable_renders_but_has_no_answer_segments(source, reason):
    template = checkpoint_template(source, SPECIAL_TOKENS)
    messages = [user("Hi"), assistant("Hello"), user("Bye")]
    listed = [{"role": m["role"], "content": [text(m["content"])]} for m in messages]
    assert template.render(messages) == hugging_face_render(source, listed, True)
    with pytest.raises(RequestError, match=f"not prefix-stable.*{reason}"):
        template.segments(messages)
    assert template.segments(messages[:1]) == [Segment(template.render(messages[:1]))]


def test_checkpoint_template_errors():
    with pytest.raises(CheckpointError, match="not valid Jinja"):
        checkpoint_template("{% for m in messages %}", {})
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}ok"
    with pytest.raises(RequestError, match="no system, please"):
        checkpoint_template(picky, {}).render([system("S"), user("Hi")])
    escaping = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError, match="unsafe"):
        checkpoint_template(escaping, {}).render([user("Hi")])
