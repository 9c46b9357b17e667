"""InternLM-XComposer, the first (InternLMXComposer): EVA's tower, a Q-Former of 64 rows between two learned vectors,
and InternLM-7B, which is a Llama with biases in its attention.

config.json describes only the decoder and the number of queries, since the published code fixes the sizes of tower and
Q-Former. Other sizes are in the sections vision_config and qformer_config, with BLIP-2's fields. Low-rank weights built
into the decoder (internlm_lora) are merged while loading, W + lora_alpha / lora_r * B A in float32, and not written
back. A video is the rows of its frames.

Differences from the published code:
- Its script for merging low-rank weights has a scale of 1 instead of lora_alpha / lora_r.
- Its `chat` keeps earlier turns without the meta instruction and without the tokens that end a turn; training has both,
  and so has the template here ("xcomposer").
- Its tokenizer is read as transformers' LlamaTokenizer, which puts no second "▁" before a text that begins with a
  space.
- It tokenises the question apart from what follows; here the text after an image is tokenised whole, as in training.

Sources: internlm/internlm-xcomposer-7b configuration_InternLM_XComposer.py, modeling_InternLM_XComposer.py,
modeling_InternLM.py; InternLM/InternLM-XComposer 0f70c3e InternLM-XComposer-1.0/finetune.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.blip2 import QFormerFields
from llava_fast.families.lavis_names import LavisNames
from llava_fast.families.llava_original import IMAGE_TOKEN_ID
from llava_fast.families.parts import decoder_config, eos_field, eos_token_ids, refuse_quantised, require, tower_config
from llava_fast.families.preprocessing import geometry_fields
from llava_fast.inputs.pictures.preprocessing import Preprocessing, standard_fit
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.base import ConnectorConfig
from llava_fast.models.connectors.framed_qformer import FramedQFormerConfig
from llava_fast.models.connectors.qformer import QFormerConfig
from llava_fast.models.decoders.llama import LlamaConfig
from llava_fast.models.towers.base import TowerConfig
from llava_fast.models.towers.eva import EvaFields
from llava_fast.models.towers.eva_lavis import EvaLavisConfig
from llava_fast.ops.activations import ACTIVATIONS
from llava_fast.storage.bounds import Positive
from llava_fast.storage.files import Fields, check_fields, one_line, read_json_if_there


class BuiltInLora(Fields):
    """internlm_lora: the decoder's low-rank weights. Which Linears have them is seen from the stored tensors."""

    lora_r: Annotated[int, Field(ge=1, le=2**16)] = 8
    lora_alpha: Positive = 16


class XComposerFields(fields.Decoder):
    """config.json."""

    num_query_token: Annotated[int, Field(ge=1, le=2**14)] = 32
    kqvo_bias: bool | None = None
    intern_converted_llm: bool | None = None
    internlm_lora: BuiltInLora | None = None
    vision_config: EvaFields | None = None
    qformer_config: QFormerFields | None = None
    quantization_config: dict[str, Any] | None = None


class XComposer(Family):
    """InternLM-XComposer 1."""

    model_types = ("InternLMXComposer",)
    system = "InternLM-XComposer 1"
    reference = "transformers' BLIP-2 parts and Llama with the original's steps"
    layout = "original"
    adapter_spelling = "original"
    tokenizer_class = "LlamaTokenizer"
    names: ClassVar[LavisNames] = LavisNames(
        {
            "original": (
                ("decoder.lm_head.", "internlm_model.lm_head."),
                ("decoder.", "internlm_model.model."),
                ("vision_tower.post_layernorm.", "ln_vision."),
                ("vision_tower.", "visual_encoder."),
                ("projector.query_tokens", "query_tokens"),
                ("projector.start", "flag_image_start"),
                ("projector.end", "flag_image_end"),
                ("projector.language_projection.", "internlm_proj."),
                ("projector.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
                ("projector.", "Qformer.bert."),
            )
        }
    )

    def read(self, source: dict[str, Any], path: Path) -> LlavaConfig:
        file = path / "config.json"
        check_fields(source, XComposerFields, file)
        refuse_quantised(source, file)
        text = _text_config(source, file)
        decoder = decoder_config(text, file, tied=bool(text.tie_word_embeddings))
        vision = _tower(source, file)
        generation = read_json_if_there(path / "generation_config.json", fields.Generation)
        pad = generation.get("pad_token_id", source.get("pad_token_id"))
        connector = _connector(source, vision, decoder.hidden_size, file)
        images = Preprocessing(standard_fit("squash", vision.image_size))
        return LlavaConfig(
            vision=vision,
            projector=connector,
            decoder=decoder,
            geometry=VisualGeometry(
                vision.image_size,
                vision.patch_size,
                compat="llava",
                class_rows=1,
                tile_rows=connector.rows_of(vision.rows_per_tile),
                **geometry_fields(images, images, vision.image_size),
            ),
            layout="original",
            model_type=self.model_types[0],
            image_token_id=IMAGE_TOKEN_ID,
            eos_token_ids=eos_token_ids(generation, source.get("eos_token_id", 2)),
            pad_token_id=pad if pad is not None and pad >= 0 else None,
            source=source,
        )

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        decoder, vision, connector = config.decoder, config.vision, config.projector
        if not isinstance(decoder, LlamaConfig) or not isinstance(vision, EvaLavisConfig):
            raise CheckpointError(
                f"an InternLM-XComposer is an EVA and an InternLM, not {vision.kind}, {decoder.family}"
            )
        if (
            not isinstance(connector, FramedQFormerConfig)
            or decoder.mlp_bias
            or decoder.num_kv_heads < decoder.num_heads
        ):
            raise CheckpointError(f"no InternLM-XComposer has {connector} before {decoder}")
        dropped = ("attention_bias", "mlp_bias", "rope_theta", "head_dim", "num_key_value_heads")
        made = {name: value for name, value in decoder.to_hf().items() if name not in dropped}
        return {
            "architectures": ["InternLMXComposerForCausalLM"],
            "model_type": self.model_types[0],
            **made,
            "vocab_size": tokens.vocab_size,
            "bias": decoder.o_bias,
            "kqvo_bias": decoder.o_bias,
            "intern_converted_llm": True,
            "internlm_lora": None,
            "num_query_token": connector.queries,
            "num_quant": connector.queries,
            "eos_token_id": eos_field(config),
            "pad_token_id": config.pad_token_id,
            "vision_config": vision.to_hf(),
            "qformer_config": qformer_fields(connector),
        }

    def unchanged(self, config: LlavaConfig) -> dict[str, Any]:
        """The low-rank weights are merged."""
        return {name: value for name, value in config.source.items() if name != "lora_cfg"} | {"internlm_lora": None}

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        return {}

    def template(self, name: str, config: LlavaConfig) -> str:
        return "xcomposer"

    def built_in_lora(self, config: LlavaConfig) -> tuple[float, int] | None:
        lora = config.source.get("internlm_lora")
        return None if lora is None else (lora.get("lora_alpha", 16), lora.get("lora_r", 8))

    def adapted_model(self, config: LlavaConfig, file: Path) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return _Named(AutoModelForCausalLM.from_config(_text_config(config.source, file)))


class _Named(nn.Module):
    """The language model by its name in the whole one."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.internlm_model = decoder
        self.get_input_embeddings = decoder.get_input_embeddings
        self.get_output_embeddings = decoder.get_output_embeddings


def _text_config(source: dict[str, Any], file: Path) -> Any:
    """InternLM as transformers' Llama."""
    from transformers import LlamaConfig as HfLlamaConfig  # seconds to import, as in parts.py

    for field in ("rope_scaling", "rope_parameters", "rope_theta", "num_key_value_heads"):
        if source.get(field) is not None and (field != "rope_theta" or source[field] != 10000):
            raise CheckpointError(
                f"{file}: {field} is {source[field]!r}, which InternLM's code does not read: leave it out"
            )
    biased = source.get("kqvo_bias", True) and source.get("intern_converted_llm", True)
    defaults = {"vocab_size": 103168, "hidden_size": 4096, "intermediate_size": 11008, "rms_norm_eps": 1e-5}
    known = fields.Decoder.model_fields.keys() - {"model_type", "pad_token_id", "attention_bias", "rope_theta"}
    given = defaults | {field: value for field, value in source.items() if field in known}
    try:
        return HfLlamaConfig(**given, attention_bias=bool(biased))
    except Exception as problem:  # transformers' validators raise many unrelated types
        raise CheckpointError(f"{file} describes no InternLM: {one_line(problem)}") from problem


def _tower(source: dict[str, Any], file: Path) -> TowerConfig:
    """EVA's ViT-g, or one of the sizes in vision_config."""
    return lavis_tower(source.get("vision_config") or {}, file, final_norm_eps=1e-5)


def lavis_tower(given: dict[str, Any], file: Path, **choices: Any) -> EvaLavisConfig:
    """LAVIS' ViT-g with the given fields of BLIP-2's vision_config. All of its rows reach the connector."""
    from transformers import Blip2VisionConfig

    stated: Any = Blip2VisionConfig(**given)
    stated.model_type = "eva_lavis"
    made = tower_config(stated, file, feature_layers=(-1,), keep_class_row=True, **choices)
    assert isinstance(made, EvaLavisConfig)
    return made


def _connector(source: dict[str, Any], vision: TowerConfig, out_features: int, file: Path) -> ConnectorConfig:
    given = lavis_qformer(source.get("qformer_config") or {}, vision, file)
    queries = source.get("num_query_token", 32)
    return FramedQFormerConfig(**given, out_features=out_features, queries=queries)


def lavis_qformer(given: dict[str, Any], vision: TowerConfig, file: Path) -> dict[str, Any]:
    """The fields of a QFormerConfig that LAVIS fixes (BERT-base's), with those of a BLIP-2's qformer_config."""
    from transformers import Blip2QFormerConfig

    qformer = Blip2QFormerConfig(**given)
    check_fields(
        {name: getattr(qformer, name) for name in QFormerFields.model_fields}, QFormerFields, file, sparse=False
    )
    if qformer.hidden_size % qformer.num_attention_heads:
        raise CheckpointError(
            f"{file}: qformer_config.hidden_size {qformer.hidden_size} is no multiple of "
            f"{qformer.num_attention_heads} num_attention_heads"
        )
    return {
        "in_features": vision.feature_size,
        "rows": vision.rows_per_tile,
        "hidden_size": qformer.hidden_size,
        "intermediate_size": qformer.intermediate_size,
        "num_layers": qformer.num_hidden_layers,
        "num_heads": qformer.num_attention_heads,
        "cross_every": qformer.cross_attention_frequency,
        "activation": require(qformer.hidden_act, tuple(ACTIVATIONS), "qformer_config.hidden_act", file),
        "layer_norm_eps": qformer.layer_norm_eps,
    }


def qformer_fields(made: QFormerConfig) -> dict[str, Any]:
    """The inverse of `lavis_qformer`: a BLIP-2's qformer_config."""
    return {
        "hidden_size": made.hidden_size,
        "intermediate_size": made.intermediate_size,
        "num_hidden_layers": made.num_layers,
        "num_attention_heads": made.num_heads,
        "hidden_act": made.activation,
        "layer_norm_eps": made.layer_norm_eps,
        "cross_attention_frequency": made.cross_every,
        "encoder_hidden_size": made.in_features,
    }
