"""Which built-in template a checkpoint without one gets."""

import pytest

from llava_fast.errors import RequestError
from llava_fast.inputs.chat.formats import default_template_name
from llava_fast.inputs.chat.rendering import builtin_template


@pytest.mark.parametrize(
    ("name", "decoder", "expected"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava_llama", "llava_v1"),
        ("/models/vlm-v1.6-vicuna-13b/", "llama", "llava_v1"),
        ("liuhaotian/llava-v1.6-mistral-7b", "llava_mistral", "mistral_instruct"),
        ("liuhaotian/llava-v1.6-34b", "llava_llama", "chatml_direct"),
        ("liuhaotian/llava-llama-2-13b-chat-lightning-preview", "llama", "llava_llama_2"),
        ("lmms-lab/llama3-llava-next-8b", "llava_llama", "llava_llama_3"),
        ("someone/llava-llama-3-8b-v1_1", "llama", "llava_llama_3"),
        ("lmms-lab/llava-onevision-qwen2-7b-ov", "qwen2", "qwen_1_5"),
        ("someone/llava-qwen-v1", "qwen2", "qwen_1_5"),
        ("lmms-lab/llava-next-72b", "llava_qwen", "qwen_1_5"),
        ("lmms-lab/LLaVA-NeXT-Video-34B-DPO", "llava_llama", "chatml_direct"),
        ("lmms-lab/LLaVA-NeXT-Video-7B-32K", "llava_mistral", "mistral_instruct"),
        ("runs/llava-v1.5-lora/checkpoint-500", "llama", "llava_v1"),
        ("v1/my-model", "llama", "vicuna_v1"),
        ("my-model", "mistral", "mistral_instruct"),
    ],
)
def test_default_template_name(name, decoder, expected):
    assert default_template_name(name, decoder) == expected
    builtin_template(expected)


def test_default_template_of_an_unknown_decoder_is_refused():
    with pytest.raises(RequestError, match=r"'phi'.*built-in"):
        default_template_name("my-model", "phi")
