"""Named model shapes: a transformers configuration and its processors, created without downloads.

`llava-1.5-7b` and `llava-next-7b` have the real widths (their config.json files: llava-hf/llava-1.5-7b-hf and
llava-hf/llava-v1.6-vicuna-7b-hf), `tinyllama-1.1b` those of CLIP-L and TinyLlama-1.1B; `tiny` has the demo model's,
`100m` a hundred million weights. Weights are random, see subject.py. The tokenizer is a stand-in of the same vocabulary
size: bytes, then artificial words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_TOKEN = "<image>"
SPECIAL = ("<pad>", "<s>", "</s>", IMAGE_TOKEN)
PINPOINTS_336 = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
PINPOINTS_112 = [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]]
PINPOINTS_32 = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]


@dataclass(frozen=True)
class Shape:
    """The numbers of a LLaVA. `real_width`: as wide as a published model, so that memory or arithmetic, rather than
    the cost of launching operations, decides its speed."""

    name: str
    real_width: bool
    anyres: bool
    tile: int
    patch: int
    vision_width: int
    vision_mlp: int
    vision_layers: int
    vision_heads: int
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    pinpoints: tuple = ()


_CLIP_L = {"vision_width": 1024, "vision_mlp": 4096, "vision_layers": 24, "vision_heads": 16}
_LLAMA_7B = {
    "width": 4096,
    "mlp": 11008,
    "layers": 32,
    "heads": 32,
    "kv_heads": 32,
    "vocabulary": 32064,
    "context": 4096,
}
_TINYLLAMA = {
    "width": 2048,
    "mlp": 5632,
    "layers": 22,
    "heads": 32,
    "kv_heads": 4,
    "vocabulary": 32064,
    "context": 2048,
}
_TINY = {"vision_width": 128, "vision_mlp": 512, "vision_layers": 3, "vision_heads": 8}
_TINY |= {"width": 128, "mlp": 352, "layers": 4, "heads": 4, "kv_heads": 2, "vocabulary": 352, "context": 1024}
_100M = {"vision_width": 384, "vision_mlp": 1536, "vision_layers": 6, "vision_heads": 6}
_100M |= {"width": 768, "mlp": 2048, "layers": 12, "heads": 12, "kv_heads": 4, "vocabulary": 8192, "context": 2048}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", False, True, tile=32, patch=4, pinpoints=PINPOINTS_32, **_TINY),
        Shape("100m", False, True, tile=112, patch=14, pinpoints=PINPOINTS_112, **_100M),
        Shape("llava-1.5-7b", True, False, tile=336, patch=14, **_CLIP_L, **_LLAMA_7B),
        Shape("tinyllama-1.1b", True, False, tile=336, patch=14, **_CLIP_L, **_TINYLLAMA),
        Shape("llava-next-7b", True, True, tile=336, patch=14, pinpoints=PINPOINTS_336, **_CLIP_L, **_LLAMA_7B),
        # The whole tower and projector, and a decoder of one layer, for suites that stop before the decoder.
        Shape(
            "llava-next-7b-encoder",
            True,
            True,
            tile=336,
            patch=14,
            pinpoints=PINPOINTS_336,
            **_CLIP_L,
            **_LLAMA_7B | {"layers": 1},
        ),
    )
}


def build_config(shape: Shape, layers: int | None = None) -> Any:
    """A LlavaConfig or LlavaNextConfig of transformers.

    `layers` cuts the decoder to that many layers, and the tower too if it has more. A truncated or tiny tower
    uses the output of its last layer instead of the one before: transformers runs every layer of a tower and llava_fast
    only the required ones, and skipping 1 of 3 layers instead of 1 of 24 would favour llava_fast.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

    cut = layers is not None and layers < shape.vision_layers
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_mlp,
        num_hidden_layers=layers if cut else shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.tile,
        patch_size=shape.patch,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.width // shape.heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-5,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )
    common = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": SPECIAL.index(IMAGE_TOKEN),
        "vision_feature_layer": -2 if shape.real_width and not cut else -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
    }
    if not shape.anyres:
        return LlavaConfig(image_seq_length=(shape.tile // shape.patch) ** 2, **common)
    return LlavaNextConfig(image_grid_pinpoints=[list(pair) for pair in shape.pinpoints], **common)


def build_tokenizer(vocabulary: int) -> Any:
    """Return a byte-level tokenizer of exactly `vocabulary` ids, each of which decodes to text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = list(SPECIAL) + sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += [f"\u0120word{number}" for number in range(vocabulary - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
    )


def build_processor(shape: Shape) -> Any:
    """LlavaProcessor or LlavaNextProcessor with the Pillow image processor."""
    from transformers import LlavaNextProcessor, LlavaProcessor

    sizes = {
        "size": {"shortest_edge": shape.tile},
        "crop_size": {"height": shape.tile, "width": shape.tile},
    }
    common = {
        "tokenizer": build_tokenizer(shape.vocabulary),
        "patch_size": shape.patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": IMAGE_TOKEN,
    }
    if not shape.anyres:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        return LlavaProcessor(image_processor=CLIPImageProcessorPil(**sizes), **common)
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    pinpoints = [list(pair) for pair in shape.pinpoints]
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **sizes), **common
    )


def write_directory(shape: Shape, layers: int | None, directory: Path) -> None:
    """Write a checkpoint directory without weights."""
    build_config(shape, layers).save_pretrained(directory)
    build_processor(shape).save_pretrained(directory)
