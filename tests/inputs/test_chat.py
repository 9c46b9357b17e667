"""Prompts and label segments of the built-in templates against strings written by hand."""

import subprocess
import sys

import pytest

from llava_fast.errors import RequestError
from llava_fast.inputs.chat.formats import TURN_FORMATS
from llava_fast.inputs.chat.rendering import Segment, builtin_template
from llava_fast.inputs.requests import render_request


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA_V1_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
META = (
    "meta instruction\nYou are an AI assistant whose name is 浦语.\n- 浦语 is a conversational language model that is "
    "developed by Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- 浦语 can understand and communicate fluently in the language chosen by the user such as English and 中文.\n"
    "conversation\n"
)
VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature."
    "\n\nIf a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't share false "
    "information."
)
ONE_TURN = [user([IMAGE, text("What is it?")])]
TWO_TURNS = [*ONE_TURN, assistant("A cat."), user("Which colour?")]

# name: (one question, two questions with an answer between them), both with the generation prompt
PROMPTS = {
    "vicuna_v1": (
        VICUNA_SYSTEM + " USER: <image>\nWhat is it? ASSISTANT:",
        VICUNA_SYSTEM + " USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Which colour? ASSISTANT:",
    ),
    "llava_v1": (
        LLAVA_V1_SYSTEM + " USER: <image>\nWhat is it? ASSISTANT:",
        LLAVA_V1_SYSTEM + " USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Which colour? ASSISTANT:",
    ),
    "llama_2": (
        f"[INST] <<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]",
        (
            f"[INST] <<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A cat. </s>"
            "<s>[INST] Which colour? [/INST]"
        ),
    ),
    "llava_llama_2": (
        f"[INST] <<SYS>>\n{VISION_SYSTEM}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]",
        (
            f"[INST] <<SYS>>\n{VISION_SYSTEM}\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A cat. </s>"
            "<s>[INST] Which colour? [/INST]"
        ),
    ),
    "mistral": (
        "[INST] <image>\nWhat is it? [/INST]",
        "[INST] <image>\nWhat is it? [/INST] A cat. </s>[INST] Which colour? [/INST]",
    ),
    "chatml_direct": (
        (
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
            "<|im_start|>assistant\n"
        ),
        (
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|>"
            "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nWhich colour?<|im_end|>"
            "<|im_start|>assistant\n"
        ),
    ),
    "llava_llama_3": (
        (
            f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{VISION_SYSTEM}<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        (
            f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{VISION_SYSTEM}<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhich colour?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "slime_llama_3": (
        (
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        (
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhich colour?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "qwen": (
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?"
            "<|im_end|>\n<|im_start|>assistant\n"
        ),
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?"
            "<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nWhich colour?<|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
    ),
    "blip2": (
        "<image>Question: What is it? Answer:",
        "<image>Question: What is it? Answer: A cat.\nQuestion: Which colour? Answer:",
    ),
    "instructblip": ("<image>What is it?", "<image>What is it? A cat.</s>Which colour?"),
    "xcomposer": (
        META + " <|User|>:<image>What is it?\n<TOKENS_UNUSED_0> <|Bot|>:",
        META + " <|User|>:<image>What is it?\n<TOKENS_UNUSED_0> <|Bot|>: A cat.<TOKENS_UNUSED_1>"
        " <|User|>:Which colour?\n<TOKENS_UNUSED_0> <|Bot|>:",
    ),
    "qwen_vl": (
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nPicture 1: <image>\n"
            "What is it?<|im_end|>\n<|im_start|>assistant\n"
        ),
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nPicture 1: <image>\n"
            "What is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nWhich colour?"
            "<|im_end|>\n<|im_start|>assistant\n"
        ),
    ),
    "qwen_vl_raw": (
        "Picture 1: <image>\nWhat is it?",
        "Picture 1: <image>\nWhat is it?A cat.<|endoftext|>Which colour?",
    ),
    "monkey": (
        "<image> What is it? Answer: ",
        "<image> What is it? Answer: A cat.<|endoftext|> Which colour? Answer: ",
    ),
}
CHAT_FORMATS = [f.name for f in TURN_FORMATS if f.name != "plain"]


# ---------------------------------------------------------------- built-in prompts


def test_every_chat_format_has_expected_prompts():
    assert sorted(PROMPTS) == sorted(CHAT_FORMATS)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_of_one_and_two_questions(name):
    one, two = PROMPTS[name]
    template = builtin_template(name)
    assert template.render(ONE_TURN) == one
    assert template.render(TWO_TURNS) == two


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("vicuna_v1", "Be brief. USER: Hi ASSISTANT:"),
        ("llama_2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
        ("mistral", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"),
        (
            "chatml_direct",
            "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n",
        ),
        (
            "llava_llama_3",
            (
                "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"
            ),
        ),
        (
            "qwen",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_system_override_as_argument_or_first_message(name, prompt):
    template = builtin_template(name)
    assert template.render([user("Hi")], system="Be brief.") == prompt
    assert template.render([system("Be brief."), user("Hi")]) == prompt
    with pytest.raises(RequestError, match="twice"):
        template.render([system("Be brief."), user("Hi")], system="Be long.")


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("vicuna_v1", "USER: Hi ASSISTANT:"),
        ("llama_2", "[INST] Hi [/INST]"),
        ("qwen", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_empty_system_leaves_it_out(name, prompt):
    assert builtin_template(name).render([user("Hi")], system="") == prompt
    assert builtin_template(name).render([system(""), user("Hi")]) == prompt


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([IMAGE, IMAGE, text("Compare.")], "<image>\n<image>\nCompare."),
        ([text("Left:"), IMAGE, text("Right:"), IMAGE], "Left:\n<image>\nRight:\n<image>"),
        ([text("Look"), text(" here."), IMAGE], "Look here.\n<image>"),
        ([IMAGE, text("")], "<image>"),
        ([{"type": "video"}, text("What happens?")], "<video>\nWhat happens?"),
        ("See <image> and <image>.", "See <image> and <image>."),
        ("Was ist 这是什么 🐈\u200d⬛?", "Was ist 这是什么 🐈\u200d⬛?"),
        ("  two\n\n spaces \t", "  two\n\n spaces \t"),
    ],
)
def test_user_content_is_written_in_order_and_verbatim(content, expected):
    assert builtin_template("mistral").render([user(content)]) == f"[INST] {expected} [/INST]"


def test_llama_3_trims_texts_as_its_tokeniser_template_does():
    messages = [system(" Be brief.\n"), user("  Hi\n"), assistant("\n Hello "), user("Bye ")]
    assert builtin_template("llava_llama_3").render(messages) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_plain_keeps_the_marks_and_the_caption_only():
    plain = builtin_template("plain")
    messages = [user("Give a short caption.\n<image>"), assistant("a cat on a mat")]
    assert plain.render(messages) == "<image>a cat on a mat\n"
    assert plain.render(messages[:1]) == "<image>"
    assert plain.render([user([text("Caption:"), {"type": "video"}, IMAGE])]) == "<video><image>"
    assert plain.segments(messages) == [Segment("<image>"), Segment("a cat on a mat\n", True, True)]
    with pytest.raises(RequestError, match="one user message with an image"):
        plain.render([user("no image"), assistant("caption")])
    with pytest.raises(RequestError, match="one user message with an image"):
        plain.render([*messages, user("<image>")])
    with pytest.raises(RequestError, match="no system prompt"):
        plain.render(messages, system="Be brief.")


def test_generation_prompt_is_optional_and_only_follows_a_user():
    vicuna = builtin_template("vicuna_v1")
    assert vicuna.render([user("Hi")], "S", add_generation_prompt=False) == "S USER: Hi "
    answered = [user("Hi"), assistant("Hello")]
    assert vicuna.render(answered, "S") == "S USER: Hi ASSISTANT: Hello</s>"
    assert vicuna.render(answered, "S", add_generation_prompt=False) == "S USER: Hi ASSISTANT: Hello</s>"


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("v1", "vicuna_v1"),
        ("v0_plain", "plain"),
        ("mistral_instruct", "mistral"),
        ("llava_mistral_instruct", "mistral"),
        ("mistral_direct", "chatml_direct"),
        ("qwen_1_5", "qwen"),
        ("qwen_2", "qwen"),
    ],
)
def test_original_names_are_aliases(alias, name):
    assert builtin_template(alias) == builtin_template(name)
    assert builtin_template(alias).name == name


def test_unknown_template_lists_the_known_ones():
    with pytest.raises(RequestError) as error:
        builtin_template("gemma")
    for turn_format in TURN_FORMATS:
        assert turn_format.name in str(error.value)


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("plain", "\n"),
        ("vicuna_v1", "</s>"),
        ("llava_v1", "</s>"),
        ("llama_2", "</s>"),
        ("llava_llama_2", "</s>"),
        ("mistral", "</s>"),
        ("chatml_direct", "<|im_end|>"),
        ("llava_llama_3", "<|eot_id|>"),
        ("qwen", "<|im_end|>"),
    ],
)
def test_stop_strings(name, stop):
    assert builtin_template(name).stop == (stop,)


# ---------------------------------------------------------------- label segments


def test_vicuna_segments():
    messages = [user("Hi"), assistant("Hello"), user("Bye"), assistant("Ciao")]
    assert builtin_template("vicuna_v1").segments(messages, "S") == [
        Segment("S USER: Hi ASSISTANT:"),
        Segment(" Hello</s>", True, True),
        Segment("USER: Bye ASSISTANT:"),
        Segment(" Ciao</s>", True, True),
    ]


def test_llama_2_and_mistral_segments():
    messages = [user("Hi"), assistant("Hello"), user("Bye"), assistant("Ciao")]
    assert builtin_template("llama_2").segments(messages, "S") == [
        Segment("[INST] <<SYS>>\nS\n<</SYS>>\n\nHi [/INST]"),
        Segment(" Hello </s>", True, True),
        Segment("<s>[INST] Bye [/INST]"),
        Segment(" Ciao </s>", True, True),
    ]
    assert builtin_template("mistral").segments(messages)[2] == Segment("[INST] Bye [/INST]")


def test_chatml_direct_segments():
    assert builtin_template("chatml_direct").segments([user("Hi"), assistant("Hello")]) == [
        Segment(
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"
        ),
        Segment("Hello<|im_end|>", True, True),
    ]


def test_qwen_original_trainer_supervises_role_tokens_and_newlines_too():
    template = builtin_template("qwen")
    assert template.segments([user("Hi"), assistant("Hello")]) == [
        Segment("<|im_start|>", False, True),
        Segment("system"),
        Segment("\n", False, True),
        Segment("You are a helpful assistant."),
        Segment("<|im_end|>\n<|im_start|>", False, True),
        Segment("user"),
        Segment("\n", False, True),
        Segment("Hi"),
        Segment("<|im_end|>\n<|im_start|>assistant\n", False, True),
        Segment("Hello<|im_end|>", True, True),
        Segment("\n", False, True),
    ]
    assert template.original_label_tokens == ("<|im_start|>", "<|im_end|>", "\n")
    assert builtin_template("vicuna_v1").original_label_tokens == ()


def test_llama_3_original_trainer_supervises_headers_too():
    template = builtin_template("llava_llama_3")
    assert template.segments([user("Hi"), assistant("Hello")], "S") == [
        Segment("<|begin_of_text|><|start_header_id|>", False, True),
        Segment("system"),
        Segment("<|end_header_id|>", False, True),
        Segment("\n\nS"),
        Segment("<|eot_id|><|start_header_id|>", False, True),
        Segment("user"),
        Segment("<|end_header_id|>", False, True),
        Segment("\n\nHi"),
        Segment("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", False, True),
        Segment("Hello<|eot_id|>", True, True),
    ]
    assert "\n\n" not in template.original_label_tokens


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_answer_follows_the_generation_prompt_exactly(name):
    template = builtin_template(name)
    messages = [user([IMAGE, text("Hi")]), assistant(" 1st "), user("Bye"), assistant("2nd")]
    before, openings = "", []
    for segment in template.segments(messages):
        if segment.supervised:
            openings.append(before)
            assert segment.text.endswith(template.stop)
            assert segment.supervised_original
        before += segment.text
    assert openings == [template.render(messages[:1]), template.render(messages[:3])]
    assert before == template.render(messages)


def test_importing_and_rendering_built_ins_needs_no_torch():
    code = (
        "import sys; from llava_fast.inputs.chat import rendering as chat; "
        "chat.builtin_template('qwen').render([{'role': 'user', 'content': 'Hi'}]); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["xcomposer", "monkey", "instructblip"])
def test_without_a_video_its_placeholder_is_text(name):
    message = user("What does the <video> tag do?")
    still, shown = (
        "".join(segment.text for segment in render_request(builtin_template(name), {"messages": [message]} | more)[0])
        for more in ({}, {"video": "a.mp4"})
    )
    assert message["content"] in still
    assert "What does the  tag do?" in shown
    assert shown.index("<video>") < shown.index("What")
