"""Build the untrained demo model: a tiny LLaVA-NeXT directory in the Hugging Face layout.

    python examples/digits/make_model.py OUT_DIR

Writes the configuration, random weights, the tokenizer with its chat template and the processor settings.
`llava_fast.load(OUT_DIR)` and transformers' LlavaNextForConditionalGeneration and LlavaNextProcessor read the same
directory.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from llava_fast.demo import PHRASINGS

try:  # transformers keeps the Pillow processor in a module of its own from 5.x on
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil as ImageProcessor,
    )
except ImportError:
    from transformers import LlavaNextImageProcessor as ImageProcessor

TILE = 32
PATCH = 4
GRIDS = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]  # (height, width)
SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "image": "<image>"}

# "USER: <image>\nquestion ASSISTANT: answer</s>USER: ...": the generation prompt is a prefix of the text with the
# answer. Every answer follows a space, so a digit is always the same token.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] if message['content'] is string \
else message['content'][0]['text'] }}{{ '\\n' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] in ['image', 'image_url'] -%}{{ '<image>\\n' }}
{%- elif item['type'] == 'text' -%}{{ item['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ ' ' }}
{%- else -%}{{ 'ASSISTANT: ' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{{ message['content'][0]['text'] }}
{%- endif -%}
{{ eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train byte-level BPE on the demo's phrases: each of their words is one token, other text is split into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [f" {word}" for word in (*range(10), "none")]
    corpus = [f"USER: \nASSISTANT: {' '.join(words)} ASSISTANT: USER: {p} {p}" for p in sum(PHRASINGS.values(), ())]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL["pad"],
        bos_token=SPECIAL["bos"],
        eos_token=SPECIAL["eos"],
        extra_special_tokens={"image_token": SPECIAL["image"]},
        padding_side="left",
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaNextConfig:
    """The architecture: a 4-layer CLIP tower of width 128, of which 3 layers are used (as in LLaVA, features come from
    the last layer but one), and a 4-layer Llama decoder of width 128 with grouped key heads."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=128,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(SPECIAL["image"]),
        image_grid_pinpoints=GRIDS,
        image_seq_length=(TILE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaNextProcessor:
    """Return processor settings that match the configuration (bicubic resize, CLIP's mean and standard deviation)."""
    image_processor = ImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=GRIDS,
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=SPECIAL["image"],
        chat_template=CHAT_TEMPLATE,
    )


def make_model(path: str | Path, seed: int = 0) -> None:
    """Write the untrained model directory. Weights are determined by the seed."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(build_config(tokenizer))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    build_processor(tokenizer).save_pretrained(path)


if __name__ == "__main__":
    make_model(sys.argv[1])
