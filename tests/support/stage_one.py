"""A tiny BLIP-2 of stage 1 in transformers, a BERT to begin one with, and captions to train it on."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from tests.support import tiny
from tests.support.qformers import question_tokenizer

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDTH = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
QUERIES, TILE = 4, 32
CAPTIONS = ["a red cup", "two green cups near a table", "the red box says hello", "nothing", "a table", "hello"]
CAPTIONS += ["what is it", "one more", "zebra", "quite another box", "f", "in the night"]


def words() -> transformers.PreTrainedTokenizerFast:
    """Bytes between [CLS] and [SEP], with a first word for captions."""
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=question_tokenizer().backend_tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    made.add_special_tokens({"bos_token": "[DEC]"})
    return made


def reference() -> transformers.Blip2ForImageTextRetrieval:
    """A random model, its weights scaled so that scores differ."""
    torch.manual_seed(0)
    qformer = {**WIDTH, "vocab_size": len(words()), "max_position_embeddings": 64, "use_qformer_text_input": True}
    config = transformers.Blip2Config(
        vision_config={**TOWER, "image_size": TILE, "patch_size": 8, "qkv_bias": True},
        qformer_config={**qformer, "cross_attention_frequency": 2, "encoder_hidden_size": TOWER["hidden_size"]},
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
    )
    model = transformers.Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1 or name == "query_tokens":
                value.normal_(std=0.3)
    return model


def save_reference(folder: Path) -> transformers.Blip2ForImageTextRetrieval:
    """Write it as transformers does; returns it."""
    model = reference()
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    size = {"height": TILE, "width": TILE}
    transformers.BlipImageProcessor(size=size).save_pretrained(folder)
    return model


def save_bert(folder: Path) -> transformers.BertForMaskedLM:
    torch.manual_seed(1)
    config = transformers.BertConfig(**WIDTH, vocab_size=len(question_tokenizer()), max_position_embeddings=64)
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(folder)
    question_tokenizer().save_pretrained(folder)
    return model


def save_captions(folder: Path) -> Path:
    """Pictures of one colour each, whose captions differ."""
    samples = []
    for number, caption in enumerate(CAPTIONS):
        pixels = np.full((40, 48, 3), np.random.default_rng(number).integers(0, 256, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        samples.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (folder / "captions.json").write_text(json.dumps(samples))
    return folder / "captions.json"


PICTURES = [tiny.picture(60, 90), tiny.picture(32, 32), tiny.picture(90, 20)]
