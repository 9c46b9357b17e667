"""What transformers' models with a Q-Former need to be compared with: prompts without an image, the BOS token after
images, and a tokenizer for questions."""

from __future__ import annotations

import functools

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors


class TextToo:
    """Text alone is for the language model; transformers' classes fail without pixels."""

    def forward(self, pixel_values=None, input_ids=None, **rest):
        if pixel_values is not None:
            return super().forward(pixel_values=pixel_values, input_ids=input_ids, **rest)
        return self.language_model(input_ids=input_ids, **rest)

    def generate(self, pixel_values=None, **options):
        if pixel_values is not None:
            return super().generate(pixel_values, **options)
        return self.language_model.generate(**options)


class Blip2ForConditionalGeneration(TextToo, transformers.Blip2ForConditionalGeneration):
    pass


class InstructBlipForConditionalGeneration(TextToo, transformers.InstructBlipForConditionalGeneration):
    pass


class InstructBlipVideoForConditionalGeneration(TextToo, transformers.InstructBlipVideoForConditionalGeneration):
    pass


@functools.lru_cache
def t5_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Characters and a few words as sentencepiece splits them, each text after a space, and "</s>" at the end. The
    special tokens are those of `tiny.tokenizer`."""
    special = ["<unk>", "<s>", "</s>", "<image>", "<video>", "<pad>"]
    words = [(token, 0.0) for token in special] + [("\u2581", -2.0)]
    words += [(chr(code), -3.0) for code in range(33, 127)]
    words += [("\u2581the", -1.0), ("\u2581a", -1.0), ("hello", -1.0), ("\n", -3.0)]
    inner = Tokenizer(models.Unigram(words, unk_id=0))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    others = ["<image>", "<video>"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names, additional_special_tokens=others)


@functools.lru_cache
def question_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes between [CLS] and [SEP], as BERT's tokenizer has words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [], unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def bos_after_images(inputs: dict, image_token: int) -> dict:
    """The same prompt with its BOS token behind the image tokens that follow it, as in transformers' processor."""
    ids = inputs["input_ids"][0].tolist()
    leading = next((number for number, token in enumerate(ids[1:]) if token != image_token), len(ids) - 1)
    moved = ids[1 : leading + 1] + ids[:1] + ids[leading + 1 :]
    return inputs | {"input_ids": torch.tensor([moved])}
