"""Tiny random models of the kinds transformers knows, saved once and held by both sides; shared by the tests."""

from __future__ import annotations

import copy
import functools
import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Blip2Config,
    Blip2Processor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipProcessor,
    InstructBlipVideoConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    MistralConfig,
    MptConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    StableLmConfig,
    T5Config,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaProcessor,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.video_llava.image_processing_video_llava import VideoLlavaImageProcessor

import llava_fast
from tests.support.qformers import (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoForConditionalGeneration,
    bos_after_images,
    question_tokenizer,
    t5_tokenizer,
)

SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<video>", "<pad>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
IMAGE_ID, VIDEO_ID, PAD_ID = SPECIAL.index("<image>"), SPECIAL.index("<video>"), SPECIAL.index("<pad>")
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ t", "Ġt he", "Ġ a", "# #", "## #", "E R", "E N"]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 4096}


@functools.lru_cache
def tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the 256 bytes and a few merges; with `bos`, "<s>" comes first as Llama's does."""
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [merge.replace(" ", "") for merge in MERGES]
    inner = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split()) for m in MERGES], unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>" if bos else "<|im_end|>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>", "<video>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"],
    )


@functools.lru_cache
def internvl_tokenizer() -> PreTrainedTokenizerFast:
    """The same with InternVL's tokens, as its processor asks for them."""
    words = copy.deepcopy(tokenizer(bos=False))
    words.add_tokens(["<img>", "</img>", "<IMG_CONTEXT>"], special_tokens=True)
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words._set_model_specific_special_tokens(names | {"video_token": "<video>"})
    return words


IDEFICS3_TOKENS = ["<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<row_2_col_1>"]


@functools.lru_cache
def idefics3_tokenizer(newlines: bool) -> PreTrainedTokenizerFast:
    """The same with some tokens of Idefics3's prompts, the others being spelt out; and one for two newlines or not."""
    words = copy.deepcopy(tokenizer())
    words.add_tokens(IDEFICS3_TOKENS, special_tokens=True)
    if newlines:
        words.add_tokens(["\n\n"])
    return words


VOCABULARY = len(SPECIAL) + 256 + len(MERGES) + 4  # a few rows no token uses, as real checkpoints have


@dataclass(frozen=True)
class Case:
    """One variant: transformers' kind, its decoder and what differs from the defaults."""

    kind: str
    text: Any = LlamaConfig
    text_options: dict = field(default_factory=dict)
    tower_options: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    pinpoints: tuple = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
    tile: int = 56
    patch: int = 8
    scale: float = 0.2


def _grid(tile: int, most: int) -> tuple:
    return tuple((tile * h, tile * w) for h in range(1, most + 1) for w in range(1, most + 1))


ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
CASES = {
    "llava15": Case("llava", tile=48),
    "llava15_full": Case("llava", options={"vision_feature_select_strategy": "full"}, patch=14),
    "llava15_layers": Case("llava", options={"vision_feature_layer": [-3, 1, -1]}),
    "next": Case("llava_next"),
    "next_first_layer": Case(
        "llava_next", options={"vision_feature_layer": 1}, tile=48, pinpoints=((48, 96), (96, 48), (96, 96))
    ),
    "next_mistral_window": Case(
        "llava_next",
        MistralConfig,
        {"sliding_window": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
        tile=48,
        pinpoints=_grid(48, 2),
    ),
    "next_llama3": Case(
        "llava_next",
        text_options={"rope_parameters": ROPE_LLAMA3, "num_attention_heads": 8, "num_key_value_heads": 2},
        tile=40,
        pinpoints=((40, 80), (80, 40), (80, 80), (120, 40), (40, 120)),
    ),
    "next_biases": Case(
        "llava_next",
        text_options={"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        options={"tie_word_embeddings": True},
        tile=48,
        pinpoints=_grid(48, 3),
    ),
    "next_qwen": Case("llava_next", Qwen2Config, tile=48, pinpoints=((96, 96), (48, 144), (144, 48))),
    "next_dynamic_rope": Case(
        "llava_next",
        text_options={
            "max_position_embeddings": 96,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
        tile=32,
        pinpoints=_grid(32, 2),
    ),
    "video": Case(
        "llava_next_video",
        text_options={"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        options={"spatial_pool_mode": "average"},
    ),
    "video_max_odd": Case("llava_next_video", MistralConfig, options={"spatial_pool_mode": "max"}, patch=11),
    "onevision": Case(
        "llava_onevision",
        Qwen2Config,
        options={"vision_aspect_ratio": "anyres_max_3", "tie_word_embeddings": True},
        pinpoints=_grid(56, 4),
    ),
    "onevision_window": Case(
        "llava_onevision",
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1, "num_key_value_heads": 4},
        options={"vision_aspect_ratio": "anyres_max_9", "vision_feature_layer": -2, "tie_word_embeddings": False},
        tile=58,
        patch=14,
        pinpoints=_grid(58, 3),
    ),
    "next_qwen3": Case(
        "llava_next",
        Qwen3Config,
        {"head_dim": 24, "num_key_value_heads": 2},
        tile=48,
        pinpoints=((96, 96), (48, 144), (144, 48)),
    ),
    "onevision_qwen3": Case(
        "llava_onevision",
        Qwen3Config,
        {
            "head_dim": 32,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 32,
            "max_window_layers": 1,
        },
        options={"vision_aspect_ratio": "anyres_max_3", "tie_word_embeddings": True},
        pinpoints=_grid(56, 4),
    ),
}
CASES["internvl"] = Case(
    "internvl", Qwen2Config, {"num_key_value_heads": 2}, options={"tie_word_embeddings": True}, tile=48
)
CASES["internvl_6b"] = Case(
    "internvl",
    Qwen3Config,
    {"head_dim": 24, "num_key_value_heads": 2},
    {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": True, "use_mean_pooling": False},
    {"vision_feature_layer": -2},
    tile=32,
)
CASES["vipllava"] = Case("vipllava", options={"vision_feature_layer": [-2, -3, 1]}, tile=48)
CASES["video_llava"] = Case("video_llava", tile=48)
CASES["blip2"] = Case(
    "blip-2", OPTConfig, {"ffn_dim": 128, "word_embed_proj_dim": 64, "tie_word_embeddings": True}, tile=48
)
CASES["instructblip"] = Case("instructblip", tile=48)
SPLIT = ("idefics3", "smolvlm")
_HALF_TURNED = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
CASES |= {  # decoders that transformers runs
    "llava_opt": Case(  # transformers' LLaVA finds no embedding of OPT's to tie a head to
        "llava",
        OPTConfig,
        {"ffn_dim": 128, "word_embed_proj_dim": 64, "tie_word_embeddings": False},
        options={"tie_word_embeddings": False},
        tile=48,
    ),
    "llava_mpt": Case("llava", MptConfig, {"max_seq_len": 4096, "tie_word_embeddings": False}, tile=48, scale=0.24),
    "llava_phi": Case(
        "llava", PhiConfig, {"rope_parameters": _HALF_TURNED, "num_key_value_heads": 2}, tile=48, scale=0.3
    ),
    "next_stablelm": Case(
        "llava_next",
        StableLmConfig,
        {"rope_parameters": _HALF_TURNED, "num_key_value_heads": 2, "use_qkv_bias": True},
        tile=48,
        pinpoints=_grid(48, 2),
        scale=0.3,
    ),
}
_LARGER = {"vocab_size": VOCABULARY + 8}
CASES["idefics3"] = Case("idefics3", text_options=_LARGER, tile=24, patch=4)
CASES["smolvlm"] = Case(
    "smolvlm",
    text_options={"num_key_value_heads": 2, **_LARGER},
    options={"scale_factor": 3, "tie_word_embeddings": True},
    tile=50,  # not a multiple of the patch, as in SmolVLM's 384 and 14
)
CASES["blip2_t5"] = Case(
    "blip-2", T5Config, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, tile=48, scale=0.25
)
CASES["instructblip_t5"] = Case(
    "instructblip", T5Config, {"num_decoder_layers": 2, "tie_word_embeddings": False}, tile=48, scale=0.29
)
CASES["instructblipvideo"] = Case("instructblipvideo", tile=48)
MODELS = {
    "blip-2": (Blip2Config, Blip2ForConditionalGeneration),
    "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration),
    "instructblipvideo": (InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration),
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    "video_llava": (VideoLlavaConfig, VideoLlavaForConditionalGeneration),
    "vipllava": (VipLlavaConfig, VipLlavaForConditionalGeneration),
    "internvl": (InternVLConfig, InternVLForConditionalGeneration),
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "llava_next_video": (LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
}


T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 3, "decoder_start_token_id": PAD_ID}
QFORMER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
QUERIES = 5
READS_QUESTIONS = ("instructblip", "instructblipvideo")
WITH_QFORMER = ("blip-2", *READS_QUESTIONS)
WITH_VIDEOS = ("llava_next_video", "llava_onevision", "video_llava", "instructblipvideo")


def hf_config(case: Case):
    config_class, _ = MODELS[case.kind]
    tower = {**TOWER, "image_size": case.tile, "patch_size": case.patch, **case.tower_options}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD_ID}
    if case.text is T5Config:
        text = T5Config(**{"vocab_size": VOCABULARY, **T5, **ends, "bos_token_id": 2, **case.text_options})
    else:
        text = case.text(**{"vocab_size": VOCABULARY, **TEXT, **heads, **ends, **case.text_options})
    if case.kind in WITH_QFORMER:
        words = {"vocab_size": len(question_tokenizer())} if case.kind in READS_QUESTIONS else {}
        parts = {"vision_config": tower, "qformer_config": QFORMER | words, "text_config": text.to_dict()}
        token = {"video_token_index": VIDEO_ID} if case.kind == "instructblipvideo" else {"image_token_index": IMAGE_ID}
        return config_class(**parts, num_query_tokens=QUERIES, **token)
    vision = SiglipVisionConfig(vision_use_head=False, **tower)
    if case.kind == "internvl":
        vision = InternVLVisionConfig(**tower)
    elif case.kind != "llava_onevision":
        vision = CLIPVisionConfig(projection_dim=32, **tower)
    if case.kind in SPLIT:
        vision = {"idefics3": Idefics3VisionConfig, "smolvlm": SmolVLMVisionConfig}[case.kind](**tower)
        return config_class(vision_config=vision, text_config=text, image_token_id=IMAGE_ID, **case.options)
    options = {"image_token_id": IMAGE_ID, "vision_feature_layer": -2, **case.options}
    if case.kind == "internvl":
        rows = (case.tile // case.patch // 2) ** 2
        token = internvl_tokenizer().context_image_token_id
        own = {"image_token_id": token, "image_seq_length": rows, "vision_feature_layer": -1}
        return config_class(vision_config=vision, text_config=text, **(own | case.options))
    if case.kind == "vipllava":  # as 5.17 and 5.24 call it
        layers = options.pop("vision_feature_layer")
        return config_class(vision_config=vision, text_config=text, vision_feature_layers=layers, **options)
    if case.kind not in ("llava", "video_llava"):
        options["image_grid_pinpoints"] = [list(pair) for pair in case.pinpoints]
    if case.kind in WITH_VIDEOS:
        options["video_token_id"] = VIDEO_ID
    return config_class(vision_config=vision, text_config=text, **options)


def hf_model(case: Case, seed: int = 0):
    """A random float32 transformers model, its weights scaled so that greedy answers do not repeat themselves."""
    torch.manual_seed(seed)
    model = MODELS[case.kind][1](hf_config(case)).eval()
    if case.text is T5Config and not case.text_options.get("tie_word_embeddings", True):  # which transformers 5 ties
        model.language_model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.language_model.shared.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    parameter.mul_(2)  # as sharp as trained
            elif name.endswith("Attention.q.weight"):  # a T5 does not divide by the root of the heads' size
                parameter.normal_(0, 0.2 * case.scale)
            elif "relative_attention_bias" in name:
                parameter.normal_(0, 1)
            else:
                parameter.normal_(0, case.scale if parameter.dim() > 1 else 0.1)
    return model


def image_processor(case: Case):
    """transformers' own image processor of the PIL kind."""
    square = {"height": case.tile, "width": case.tile}
    pinpoints = [list(pair) for pair in case.pinpoints]
    if case.kind == "internvl":
        return GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, max_patches=6)
    if case.kind in SPLIT:
        kind = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}[case.kind]
        return kind(size={"longest_edge": 5 * case.tile // 2}, max_image_size={"longest_edge": case.tile})
    if case.kind == "video_llava":
        return VideoLlavaImageProcessor(size={"shortest_edge": case.tile}, crop_size=square)
    if case.kind in WITH_QFORMER:
        return BlipImageProcessorPil(size=square)
    if case.kind in ("llava", "vipllava"):
        return CLIPImageProcessorPil(size={"shortest_edge": case.tile}, crop_size=square)
    if case.kind == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=pinpoints)
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": case.tile}, crop_size=square, image_grid_pinpoints=pinpoints
    )


def frame_processor(case: Case):
    """What makes a video's frames: the same settings as transformers' video processor, which needs torchvision."""
    square = {"height": case.tile, "width": case.tile}
    if case.kind == "llava_onevision":
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

        return SiglipImageProcessorPil(
            size=square, resample=PILImageResampling.BICUBIC, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD
        )
    return CLIPImageProcessorPil(size={"shortest_edge": case.tile}, crop_size=square)


def tokenizer_of(case: Case) -> PreTrainedTokenizerFast:
    if case.text is T5Config:
        return t5_tokenizer()
    if case.kind in SPLIT:
        return idefics3_tokenizer(newlines=case.kind == "smolvlm")
    return internvl_tokenizer() if case.kind == "internvl" else tokenizer(bos=case.kind != "llava_onevision")


class AnyVideoPart:
    """A processor without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


class WithoutVideos(AnyVideoPart, InternVLProcessor):
    pass


class VideoLlavaWithoutVideos(AnyVideoPart, VideoLlavaProcessor):
    pass


class AnyIdefics3(AnyVideoPart, Idefics3Processor):
    """Idefics3's processor, whose prompts of images are also SmolVLM's (that one requires num2words for videos)."""


def hf_processor(case: Case):
    """transformers' processor: LLaVA, NeXT or OneVision (without videos, whose part needs torchvision)."""
    strategy = case.options.get("vision_feature_select_strategy", "default")
    words, images = tokenizer_of(case), image_processor(case)
    if case.kind == "internvl":
        rows = (case.tile // case.patch // 2) ** 2
        return WithoutVideos(image_processor=images, tokenizer=words, image_seq_length=rows)
    if case.kind == "blip-2":
        return Blip2Processor(images, copy.deepcopy(words), num_query_tokens=QUERIES)
    if case.kind in READS_QUESTIONS:  # that of videos needs torchvision
        return InstructBlipProcessor(images, copy.deepcopy(words), question_tokenizer(), num_query_tokens=QUERIES)
    if case.kind in SPLIT:  # which adds tokens to its tokenizer
        rows = (case.tile // case.patch // case.options.get("scale_factor", 2)) ** 2
        return AnyIdefics3(image_processor=images, tokenizer=copy.deepcopy(words), image_seq_len=rows)
    if case.kind == "llava_onevision":
        processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        processor.image_processor, processor.tokenizer, processor.image_token = images, words, "<image>"
        processor.num_image_tokens = (case.tile // case.patch) ** 2
        processor.vision_feature_select_strategy = "full"
        processor.vision_aspect_ratio = case.options["vision_aspect_ratio"]
        return processor
    if case.kind == "video_llava":
        return VideoLlavaWithoutVideos(image_processor=images, tokenizer=words, patch_size=case.patch)
    kind = LlavaProcessor if case.kind in ("llava", "vipllava") else LlavaNextProcessor
    return kind(
        image_processor=images,
        tokenizer=words,
        patch_size=case.patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
    )


@dataclass(frozen=True)
class Pair:
    """The same tiny checkpoint in transformers and here."""

    case: Case
    hf: Any
    processor: Any
    ours: Any

    def reference_inputs(
        self, prompt: str, images: list[np.ndarray] = (), video: np.ndarray | None = None, question: str | None = None
    ) -> dict:
        """What transformers' model takes for a prompt with <image> and <video> placeholders. `question`: what a
        Q-Former reads, if not the prompt."""
        if self.case.kind == "instructblipvideo":
            return self._video_inputs(prompt, list(images), video, question)
        inputs: dict = {}
        shown = []
        if len(images):
            pil = [Image.fromarray(image) for image in images]
            onevision = self.case.kind == "llava_onevision"
            # it would take a picture of 1 or 3 rows of pixels for one of channels first
            last = {"input_data_format": "channels_last"} if self.case.kind in ("video_llava", *SPLIT) else {}
            last |= {"return_row_col_info": True} if self.case.kind in SPLIT else {}
            inputs |= self.processor.image_processor([pil] if onevision else pil, return_tensors="pt", **last)
            if self.case.kind in WITH_QFORMER:  # their processors put one image before the text
                shown = ["<image>" * QUERIES] * len(images)
            else:
                shown = [self.processor.replace_image_token(inputs, number) for number in range(len(images))]
            for name in ("num_patches", "rows", "cols"):
                inputs.pop(name, None)
        if video is not None:
            frames = frame_processor(self.case)([Image.fromarray(frame) for frame in video], return_tensors="pt")
            inputs["pixel_values_videos"] = frames["pixel_values"][None]
        parts = prompt.split("<image>")
        text = parts[0] + "".join(image + part for image, part in zip(shown, parts[1:], strict=True))
        if video is not None:
            text = text.replace("<video>", "<video>" * self.video_rows(len(video)))
        inputs |= self.ours.tokenizer(text, return_tensors="pt")
        if self.case.kind == "instructblip" and len(images):
            asked = prompt.replace("<image>", "") if question is None else question
            ids = question_tokenizer()(asked, return_tensors="pt")["input_ids"].expand(len(images), -1)
            inputs |= {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
        if self.case.text is T5Config:
            inputs["decoder_input_ids"] = torch.tensor([[PAD_ID]])
        return bos_after_images(inputs, IMAGE_ID) if self.case.kind in WITH_QFORMER else inputs

    def _video_inputs(
        self, prompt: str, images: list[np.ndarray], video: np.ndarray | None, question: str | None
    ) -> dict:
        """Of a model of videos: all pictures are frames of one, in the prompt's order."""
        inputs: dict = {}
        supply, shown = iter(images), []
        for placeholder in re.findall("<image>|<video>", prompt):
            shown += [next(supply)] if placeholder == "<image>" else list(video)
        if shown:
            pixels = self.processor.image_processor([Image.fromarray(frame) for frame in shown], return_tensors="pt")
            asked = re.sub("<image>|<video>", "", prompt) if question is None else question
            ids = question_tokenizer()(asked, return_tensors="pt")["input_ids"]
            inputs = {"pixel_values": pixels["pixel_values"][None], "qformer_input_ids": ids}
            inputs["qformer_attention_mask"] = torch.ones_like(ids)
        rows = {"<image>": QUERIES, "<video>": 0 if video is None else QUERIES * len(video)}
        text = re.sub("<image>|<video>", lambda found: "<video>" * rows[found[0]], prompt)
        return bos_after_images(inputs | dict(self.ours.tokenizer(text, return_tensors="pt")), VIDEO_ID)

    @property
    def visual_ids(self) -> list[int]:
        """The tokens that images and videos bring into a prompt."""
        internvl = self.case.kind == "internvl"
        return list(internvl_tokenizer().added_tokens_decoder)[-3:] if internvl else [IMAGE_ID, VIDEO_ID]

    def visual_count(self, ids: torch.Tensor, prompt: str) -> int:
        """How many tokens images and videos bring into transformers' ids of a prompt, [1, tokens]."""
        if self.case.kind in SPLIT:  # some of them spell a text
            text = len(self.ours.tokenizer(prompt)["input_ids"]) - prompt.count("<image>")
            return ids.shape[1] - text
        return int(torch.isin(ids, torch.tensor(self.visual_ids)).sum())

    def video_rows(self, frames: int) -> int:
        side = self.case.tile // self.case.patch
        if self.case.kind == "video_llava":
            return frames * (side**2 + 1)
        if self.case.kind == "instructblipvideo":
            return frames * QUERIES
        if self.case.kind == "llava_onevision":
            return frames * (-(-side // 2)) ** 2 + 1
        return (side // 2) ** 2 * frames


@functools.lru_cache
def pair(name: str) -> Pair:
    """The models of CASES[name], through a checkpoint on disk and `llava_fast.load`."""
    case = CASES[name]
    model, processor = hf_model(case), hf_processor(case)
    with tempfile.TemporaryDirectory() as folder:
        save(case, model, folder)
        ours = llava_fast.load(folder)
    return Pair(case, model, processor, ours)


def save(case: Case, model, folder: str | Path) -> None:
    model.save_pretrained(folder)
    tokenizer_of(case).save_pretrained(folder)
    image_processor(case).save_pretrained(folder)
    if case.kind == "instructblipvideo":  # transformers' own processor of videos needs torchvision
        images = Path(folder) / "preprocessor_config.json"
        made = json.loads(images.read_text()) | {"video_processor_type": "InstructBlipVideoVideoProcessor"}
        del made["image_processor_type"]
        images.rename(Path(folder) / "video_preprocessor_config.json").write_text(json.dumps(made))
    if case.kind in READS_QUESTIONS:
        question_tokenizer().save_pretrained(Path(folder) / "qformer_tokenizer")
    hosted = case.text in (MptConfig, OPTConfig, PhiConfig, StableLmConfig)
    if hosted and case.kind != "blip-2":  # no decoder says their chat format
        (Path(folder) / "llava_fast.json").write_text('{"chat_template": "vicuna_v1"}')


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A random uint8 image [height, width, 3]."""
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
