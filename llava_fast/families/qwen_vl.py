"""Qwen-VL and Qwen-VL-Chat (model_type qwen, with a section `visual`), and Monkey (monkey) with its windows.

An image is squashed to a square and becomes 256 rows, of a Monkey 1280 (four windows, then the whole), between `<img>`
and `</img>`. Where the published code writes the image's path between them, a prompt here has `<image>`, which brings
both tokens. The chat format follows generation_config.json's chat_format; that of a Monkey is its one question. The
connector's positions are a parameter, because the published trainer trains them. Beyond seq_length, RoPE and queries
change as in the published code at inference, by the length of the prompt (models/decoders/qwen.py).

Sources: Bai et al. 2023; Li et al. 2023 (Monkey); QwenLM/Qwen-VL aa00ed0; Yuliang-Liu/Monkey 498e1d9.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.names import NameMap
from llava_fast.families.parts import decoder_config, eos_field, eos_token_ids, refuse_quantised, require, token_id
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.inputs.tiling.grid import GridTiling
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.perceiver import PerceiverConfig
from llava_fast.models.decoders.qwen import QwenFields
from llava_fast.models.towers.qwen_vit import QwenVitConfig, to_visual
from llava_fast.storage.bounds import Layers, Pixels, Positive, Size
from llava_fast.storage.files import Fields, check_fields, read_json_if_there

_RULES = (
    ("decoder.embed_tokens.", "transformer.wte."),
    ("decoder.layers.", "transformer.h."),
    ("decoder.norm.", "transformer.ln_f."),
    ("decoder.lm_head.", "lm_head."),
    ("projector.ln_post.", "transformer.visual.ln_post."),
    ("projector.proj", "transformer.visual.proj"),
    ("projector.", "transformer.visual.attn_pool."),
    ("vision_tower.", "transformer.visual."),
)
_SKIPPED = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.masked_bias$")
_HEAD = 128  # width of a head of the connector
_TEMPLATES = {"chatml": "qwen_vl", "raw": "qwen_vl_raw"}
"""chat_format of generation_config.json -> chat template."""
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "scale_attn_weights": True,
    "kv_channels": 128,
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "intermediate_size": 22016,
    "no_bias": True,
    "seq_length": 2048,
}
"""Of QWenConfig in configuration_qwen.py; seq_length has none there."""


class VisualFields(Fields):
    """config.json's section `visual`."""

    heads: Size
    image_size: Pixels
    image_start_id: Annotated[int, Field(ge=0, le=2**24)]
    layers: Layers
    mlp_ratio: Positive
    output_dim: Size
    patch_size: Pixels
    width: Size
    n_queries: Annotated[int, Field(ge=1, le=2**14)] = 256
    lora_repeat_num: Annotated[int, Field(ge=1, le=1024)] | None = None


class QwenVlFields(QwenFields):
    """config.json. Fields of the decoder that are missing have QWenConfig's defaults."""

    model_type: str
    architectures: list[str] | None = None
    visual: VisualFields | None = None
    tie_word_embeddings: bool | None = None
    eos_token_id: fields.TokenId | list[fields.TokenId] | None = None
    pad_token_id: fields.TokenId | None = None
    quantization_config: dict[str, Any] | None = None


class GenerationFields(fields.Generation):
    """generation_config.json."""

    chat_format: str | None = None


class QwenVl(Family):
    """Qwen-VL.

    architecture  the published code's class.
    """

    model_types = ("qwen",)
    system = "Qwen-VL, Qwen-VL-Chat"
    reference = "results of the published tower and resampler; its decoder's steps"
    layout = "original"
    names = NameMap({"original": _RULES}, skipped=_SKIPPED)
    adapter_spelling = "original"
    architecture: ClassVar[str] = "QWenLMHeadModel"

    def read(self, source: dict[str, Any], path: Path) -> LlavaConfig:
        file = path / "config.json"
        whole = _DEFAULTS | source
        check_fields(whole, QwenVlFields, file, sparse=False)
        refuse_quantised(source, file)
        given = QwenVlFields.model_validate(whole)
        visual = given.visual
        if visual is None:
            raise CheckpointError(f"{file} has no section visual, so it is a language model, not a {self.system}")
        require((given.architectures or [self.architecture])[0], (self.architecture,), "architectures", file)
        text = SimpleNamespace(**{name: getattr(given, name) for name in QwenFields.model_fields}, model_type="qwen")
        decoder = decoder_config(text, file, tied=bool(given.tie_word_embeddings))
        if visual.output_dim != decoder.hidden_size or visual.output_dim % _HEAD:
            raise CheckpointError(
                f"{file}: visual.output_dim is {visual.output_dim}; it must be hidden_size ({decoder.hidden_size}) "
                f"and a multiple of {_HEAD}"
            )
        if math.isqrt(visual.n_queries) ** 2 != visual.n_queries:
            raise CheckpointError(f"{file}: visual.n_queries is {visual.n_queries}; it must be a square")
        if visual.width % visual.heads:
            raise CheckpointError(f"{file}: visual.width {visual.width} is no multiple of {visual.heads} heads")
        try:
            vision = QwenVitConfig(
                hidden_size=visual.width,
                num_layers=visual.layers,
                image_size=visual.image_size,
                patch_size=visual.patch_size,
                feature_layers=(-1,),
                intermediate_size=int(visual.width * visual.mlp_ratio),
                num_heads=visual.heads,
                activation="gelu",
                layer_norm_eps=1e-6,
                windows=self.windows(visual),
            )
        except ValueError as problem:
            raise CheckpointError(f"{file}: visual: {problem}") from problem
        projector = PerceiverConfig(
            in_features=visual.width,
            out_features=visual.output_dim,
            num_heads=visual.output_dim // _HEAD,
            grid=math.isqrt(visual.n_queries),
            side=vision.side,
            own_positions=True,
            views=vision.views,
        )
        start = visual.image_start_id
        generation = read_json_if_there(path / "generation_config.json", GenerationFields)
        return LlavaConfig(
            vision=vision,
            projector=projector,
            decoder=decoder,
            geometry=VisualGeometry(
                tile_size=vision.image_size,
                patch_size=vision.patch_size,
                compat="llava",
                tile_rows=vision.views * projector.queries,
                tiling=GridTiling(1, 1, False, before=(start,), after=(start + 1,)),
            ),
            layout="original",
            model_type=given.model_type,
            image_token_id=start + 2,
            eos_token_ids=eos_token_ids(generation, given.eos_token_id),
            pad_token_id=generation.get("pad_token_id", given.pad_token_id),
            source=source,
        )

    def windows(self, visual: VisualFields) -> int:
        """Windows of an image. Raises ValueError."""
        if visual.lora_repeat_num is not None:
            raise ValueError(f"lora_repeat_num is {visual.lora_repeat_num}, and only a Monkey has windows")
        return 1

    def geometry(self, config: LlavaConfig, tokenizer: Any) -> VisualGeometry:
        start = config.image_token_id - 2
        for number, token in enumerate(("<img>", "</img>", "<imgpad>"), start=start):
            if (found := token_id(tokenizer, token, config)) != number:
                raise CheckpointError(
                    f"the tokenizer gives {token!r} the id {found}, and config.json's visual.image_start_id {start} "
                    f"means {number}: use the tokenizer with which the model was trained"
                )
        return config.geometry

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        vision, projector = config.vision, config.projector
        if not isinstance(vision, QwenVitConfig) or not isinstance(projector, PerceiverConfig):
            raise CheckpointError(f"a {self.system} has its own tower and resampler, not {vision.kind} and {projector}")
        return {
            "architectures": [self.architecture],
            "model_type": self.model_types[0],
            **config.decoder.to_hf(),
            "vocab_size": tokens.vocab_size,
            "eos_token_id": eos_field(config),
            "pad_token_id": config.pad_token_id,
            "visual": {
                **to_visual(vision),
                "image_start_id": config.image_token_id - 2,
                "n_queries": projector.queries,
                "output_dim": projector.out_features,
                **self.window_fields(vision),
            },
        }

    def window_fields(self, vision: QwenVitConfig) -> dict[str, Any]:
        """The inverse of `windows`."""
        return {}

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        return {}

    def own_template(self, name: str, config: LlavaConfig, path: Path) -> str:
        file = path / "generation_config.json"
        chat_format = read_json_if_there(file, GenerationFields).get("chat_format")
        if chat_format is None:
            return "qwen_vl" if "chat" in Path(name).name.lower() else "qwen_vl_raw"
        return _TEMPLATES[require(chat_format, tuple(_TEMPLATES), "chat_format", file)]

    def adapted_model(self, config: LlavaConfig, file: Path) -> nn.Module:
        raise CheckpointError(f"{file}: of adapters of a {self.system} only plain LoRA is supported")


class Monkey(QwenVl):
    """Monkey: an image is cut into windows, each with its own low-rank weights in the tower, and seen whole too."""

    model_types = ("monkey",)
    system = "Monkey, Monkey-Chat"
    architecture = "MonkeyLMHeadModel"

    def windows(self, visual: VisualFields) -> int:
        """The published code cuts windows of 448 pixels, which are halves of its 896, and has one set of weights for
        each."""
        windows = 4 if visual.lora_repeat_num is None else visual.lora_repeat_num
        if windows < 2:
            raise ValueError(f"lora_repeat_num is {windows}; a Monkey has at least 4 windows")
        return windows

    def window_fields(self, vision: QwenVitConfig) -> dict[str, Any]:
        return {"lora_repeat_num": vision.windows}

    def own_template(self, name: str, config: LlavaConfig, path: Path) -> str:
        return "monkey"
