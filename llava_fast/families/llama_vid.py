"""LLaMA-VID: an original LLaVA with EVA's tower, whose connector makes a context row of each image and question before
the image's content rows.

Its config.json is a LLaVA's with the field bert_type. A video frame is two rows with compress_type "mean". The question
is the text of the message that contains the image. It was trained with the image in every question of a dialogue, so a
question without one gets the last question's (see inputs.repeated); its command line instead drops the image from
earlier turns (ProcessorOptions(image_turns="given") leaves images where the request has them). Of a question of more
than 256 tokens the Q-Former reads the last 256.

The tower's size is that of the image processor that config.json names, 224 or 336; other sizes, and another Q-Former's,
are in the sections vision_config and qformer_config, with BLIP-2's fields. A checkpoint without the tower's weights
needs vision_tower=, LAVIS' eva_vit_g.pth or a directory that has it; its positions are interpolated to the size.
Without its own folder qformer_tokenizer the questions' tokenizer is that of google-bert/bert-base-uncased.

Differences from the original code: in training it deletes the newlines of a question before the Q-Former reads it,
which joins the words around one; here, as in its inference code, they separate words. Its loader leaves stored weights
of the tower unread and takes eva_vit_g.pth; here stored ones count. compress_type "grid:N" gives
(side // (side // N))^2 rows there and here, which is more than N^2 if N does not divide the side. Not supported: CLIP
towers, a BERT without queries (bert_type "raw_..."), a Q-Former trained from scratch (without vlm_att_ln).

Sources: Li et al. 2023; dvlab-research/LLaMA-VID b3d3ae2 llamavid_arch.py, multimodal_encoder/eva_vit.py, train.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch.nn import functional as F

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.families.base import Family, TokenIds
from llava_fast.families.blip2 import QFormerFields
from llava_fast.families.known_towers import Tower, layer_of
from llava_fast.families.lavis_names import LavisNames
from llava_fast.families.llava_original import IMAGE_TOKEN_ID, LlavaOriginal, text_config
from llava_fast.families.parts import decoder_config, eos_token_ids, refuse_quantised, require
from llava_fast.families.preprocessing import CLIP_KIND, Settings, geometry_fields, padded, read_preprocessing
from llava_fast.families.xcomposer import lavis_qformer, lavis_tower, qformer_fields
from llava_fast.inputs.tiling.anyres import VisualGeometry
from llava_fast.models.config import LlavaConfig
from llava_fast.models.connectors.context_content import ContextContentConfig
from llava_fast.models.connectors.mlp import ProjectorConfig
from llava_fast.models.connectors.qformer import QFormerConfig
from llava_fast.models.towers.eva import EvaFields
from llava_fast.models.towers.eva_lavis import EvaLavisConfig
from llava_fast.storage.files import check_fields, read_json_if_there
from llava_fast.storage.hub import local_directory
from llava_fast.storage.tensor_files import StoredTensor, open_file, open_weights

_WORDS, _POSITIONS = 30523, 512  # BERT's with [DEC]
_TOWER_FILES = ("eva_vit_g.pth", "eva_vit_g.safetensors")
_LAVIS_QFORMER = LavisNames(
    {
        "original": (
            ("projector.qformer.query_tokens", "query_tokens"),
            ("projector.qformer.", "Qformer.bert."),
            ("projector.norm.", "ln_vision."),
        )
    }
)
"""Of the file that a new LLaMA-VID's Q-Former comes from."""
_BERTS = ("qformer_pretrain", "qformer_pretrain_freeze", "qformer_pretrain_freeze_all")


class LlamaVidFields(fields.OriginalConfig):
    """config.json."""

    bert_type: str
    num_query: Annotated[int, Field(ge=1, le=2**14)] = 32
    compress_type: Annotated[str, Field(max_length=64)] | None = None
    image_processor: str | None = None
    vision_config: EvaFields | None = None
    qformer_config: QFormerFields | None = None


@dataclass(frozen=True)
class EvaTower(Tower):
    """LAVIS' tower in a file of its own; `home` is that file, its directory, or config.json's name of it."""

    def tensors(self, num_layers: int) -> dict[str, StoredTensor]:
        """Positions are interpolated to the config's size, bicubically in float32. Raises CheckpointError for those
        that are no class row and a square of others, of the config's width."""
        config, named, tensors = self.config, Path(self.home).expanduser(), {}
        for key, tensor in self._open(named).items():
            name = LlamaVid.names.from_stored(f"model.vision_tower.vision_tower.{key.removeprefix('visual_encoder.')}")
            inside = name is not None and name.startswith(("vision_tower.embeddings.", "vision_tower.encoder.layers."))
            if name is None or not inside or layer_of(name) >= num_layers:
                continue
            if name.endswith("position_embedding") and tensor.shape != (1, config.rows_per_tile, config.hidden_size):
                shape = (1, config.rows_per_tile, config.hidden_size)
                rows = tensor.shape[1] if len(tensor.shape) == 3 else 0
                own = math.isqrt(max(rows - 1, 0))
                if not own or tensor.shape != (1, 1 + own**2, config.hidden_size):
                    raise CheckpointError(
                        f"{tensor.file}: {key} is {list(tensor.shape)}; an EVA's positions are "
                        f"[1, 1 + n * n, {config.hidden_size}]"
                    )
                load = functools.partial(_interpolated, tensor, own, config.image_size // config.patch_size)
                tensors[name] = StoredTensor(tensor.file, tensor.key, shape, tensor.dtype, load)
            else:
                tensors[name] = tensor
        return tensors

    @staticmethod
    def _open(named: Path) -> dict[str, StoredTensor]:
        if named.is_file():
            return open_file(named)
        if named.is_dir():
            file = next((named / name for name in _TOWER_FILES if (named / name).exists()), None)
            return open_weights(named) if file is None else open_file(file)
        raise CheckpointError(
            f"the checkpoint lacks its tower's weights, and {named} does not exist; give vision_tower= LAVIS' "
            f"{_TOWER_FILES[0]} or a directory that has it"
        )


class LlamaVid(LlavaOriginal):
    """LLaMA-VID with EVA's tower."""

    model_types = ("llama_vid",)
    system = "LLaMA-VID"
    reference = "transformers' BLIP-2 and InstructBLIP parts and Llama with the original's steps"
    own_type = "llama_vid"
    config_fields = LlamaVidFields
    connector_tokenizer = "qformer_tokenizer"
    connector_tokenizer_home = "google-bert/bert-base-uncased"
    question_tokens = 256
    repeats_images = True
    video_fps = 1.0
    visual_tokens = ("<image>", "<video>")
    names: ClassVar[LavisNames] = LavisNames(
        {
            "original": (
                ("decoder.lm_head.", "lm_head."),
                *((f"decoder.{module}.", f"model.{module}.") for module in ("embed_tokens", "layers", "norm")),
                ("vision_tower.", "model.vision_tower.vision_tower."),
                ("projector.qformer.query_tokens", "model.vlm_att_query"),
                ("projector.qformer.language_projection.", "model.vlm_att_projector."),
                ("projector.qformer.", "model.vlm_att_encoder.bert."),
                ("projector.norm.", "model.vlm_att_ln."),
                ("projector.key.", "model.vlm_att_key_projector."),
                ("projector.value.", "model.vlm_att_val_projector."),
                ("projector.content.layers.", "model.mm_projector."),
            )
        }
    )
    other = Family.other

    def read_with_tower(
        self, source: dict[str, Any], path: Path, vision_tower: str | Path | None = None, base: Path | None = None
    ) -> tuple[LlavaConfig, Tower]:
        file = path / "config.json"
        check_fields(source, LlamaVidFields, file)
        refuse_quantised(source, file)
        require(source["bert_type"], _BERTS, "bert_type", file)
        require(source.get("mm_vision_select_feature", "patch"), ("patch",), "mm_vision_select_feature", file)
        for field in ("mm_use_im_start_end", "mm_use_im_patch_token"):
            if source.get(field):
                raise CheckpointError(
                    f"{file}: {field} is {source[field]!r}, and published LLaMA-VIDs have no such tokens"
                )
        text = text_config(source, file)
        decoder = decoder_config(text, file, tied=bool(text.tie_word_embeddings))
        tower = _tower(source, path, vision_tower)
        vision = tower.config
        assert isinstance(vision, EvaLavisConfig)
        connector = _connector(source, vision, decoder.hidden_size, file)
        frames = tower.preprocessing
        ratio = require(source.get("image_aspect_ratio") or "square", ("square", "pad"), "image_aspect_ratio", file)
        images = padded(frames, tower.settings, vision.image_size) if ratio == "pad" else frames
        generation = read_json_if_there(path / "generation_config.json", fields.Generation)
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
                **geometry_fields(images, frames, vision.image_size),
            ),
            layout="original",
            model_type=self.own_type,
            image_token_id=IMAGE_TOKEN_ID,
            eos_token_ids=eos_token_ids(generation, source.get("eos_token_id")),
            pad_token_id=generation.get("pad_token_id", source.get("pad_token_id")),
            source=source,
            tower_processor=dict(tower.settings.content),
        ), tower

    def assembled_fields(self, decoder: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        require(decoder, ("llama",), "model_type of a LLaMA-VID's decoder", Path(parts["decoder"]))
        aspect = require(parts["aspect"], ("square", "pad"), "aspect of a LLaMA-VID", Path("model"))
        return {
            "model_type": "llava",
            "architectures": ["LlavaLlamaAttForCausalLM"],
            "use_mm_proj": True,
            "mm_projector_type": parts["projector"],
            "mm_vision_tower": parts["vision_tower"],
            "mm_vision_select_layer": parts["feature_layer"],
            "mm_vision_select_feature": parts["feature"],
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": aspect,
            "image_processor": f"clip-patch14-{parts['image_size']}",
            "bert_type": _BERTS[0],
            "num_query": 32,
            "compress_type": parts["compress"],
            **parts["settings"],
        }

    def given_parts(self, parts: Mapping[str, Any]) -> dict[str, StoredTensor]:
        """The Q-Former, its queries and the LayerNorm before it, from LAVIS' InstructBLIP."""
        file = Path(parts["qformer_from"]).expanduser()
        named = {_LAVIS_QFORMER.from_stored(key): tensor for key, tensor in open_file(file).items()}
        found = {name: tensor for name, tensor in named.items() if name is not None}
        if "projector.qformer.query_tokens" not in found:
            raise CheckpointError(f"{file} has no query_tokens: give LAVIS' InstructBLIP, whose Q-Former reads text")
        return found

    def write(self, config: LlavaConfig, tokens: TokenIds) -> dict[str, Any]:
        decoder, vision, connector = config.decoder, config.vision, config.projector
        if not isinstance(vision, EvaLavisConfig) or not isinstance(connector, ContextContentConfig):
            raise CheckpointError(f"a LLaMA-VID has EVA's tower and a context row, not {vision.kind} and {connector}")
        if decoder.original_type != "llava_llama" or (connector.content.kind, connector.content.activation) != (
            "mlp",
            "gelu",
        ):
            raise CheckpointError(f"no LLaMA-VID has a {decoder.family} decoder behind {connector.content}")
        compress = {None: None, 1: "mean"}.get(connector.grid, f"grid:{connector.grid}")
        return {
            "architectures": ["LlavaLlamaAttForCausalLM"],
            "model_type": "llava",
            **decoder.to_hf(),
            "eos_token_id": list(config.eos_token_ids) or None,
            "pad_token_id": config.pad_token_id,
            "vocab_size": tokens.vocab_size,
            "use_mm_proj": True,
            "mm_hidden_size": vision.hidden_size,
            "mm_projector_type": f"mlp{connector.content.depth}x_gelu",
            "mm_vision_tower": "eva_vit_g.pth",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_processor": f"clip-patch{vision.patch_size}-{vision.image_size}",
            "image_aspect_ratio": "pad" if config.geometry.aspect == "pad" else "square",
            "bert_type": _BERTS[0],
            "num_query": connector.qformer.queries,
            "compress_type": compress,
            "vision_config": vision.to_hf(),
            "qformer_config": {**qformer_fields(connector.qformer), **_words(connector.qformer)},
        }

    def unchanged(self, config: LlavaConfig) -> dict[str, Any]:
        return dict(config.source)

    def processor_files(self, config: LlavaConfig) -> dict[str, dict[str, Any]]:
        return {}

    def template(self, name: str, config: LlavaConfig) -> str:
        """Training and evaluation use vicuna_v1."""
        return "vicuna_v1"


def _tower(source: dict[str, Any], path: Path, given: str | Path | None) -> EvaTower:
    """EVA's ViT-g without the LayerNorm after its last layer, the 39th of 40 ("layer -2"), for images of the size of
    its processor."""
    file, named = path / "config.json", source["mm_vision_tower"]
    if not re.search("eva|lavis", named.lower()):
        raise CheckpointError(f"{file}: mm_vision_tower is {named!r}; supported is EVA's tower, eva_vit_g.pth")
    if (layer := source.get("mm_vision_select_layer", -2)) != -2:
        raise CheckpointError(f"{file}: mm_vision_select_layer is {layer}; the original's tower always gives layer -2")
    stated, processor = dict(source.get("vision_config") or {}), source.get("image_processor") or "clip-patch14-224"
    settings = Settings({}, processor)
    if (folder := local_directory(path / processor)) is not None:
        content = read_json_if_there(folder / "preprocessor_config.json", fields.ImageProcessor)
        settings = Settings(content, str(folder / "preprocessor_config.json"))
    if "image_size" not in stated:
        size = re.search(r"(\d{3,4})/?$", processor)
        if size is None:
            raise CheckpointError(
                f"{file}: image_processor {processor!r} does not end in the side of its images, such as 224 or 336: "
                'add the size as "vision_config": {"image_size": 224}'
            )
        stated["image_size"] = int(size[1])
    config = lavis_tower(stated, file, final_norm_eps=None)
    images = dataclasses.replace(read_preprocessing(settings, CLIP_KIND, config.image_size), do_convert_rgb=True)
    described = dataclasses.replace(config, **images.values())
    home = given or next((place for place in (path / named, path / Path(named).name) if place.exists()), Path(named))
    return EvaTower(described, home, images, settings)


def _connector(source: dict[str, Any], vision: EvaLavisConfig, out_features: int, file: Path) -> ContextContentConfig:
    stated = source.get("qformer_config") or {}
    words = {
        "vocabulary": stated.get("vocab_size", _WORDS),
        "positions": stated.get("max_position_embeddings", _POSITIONS),
    }
    own = {name: value for name, value in stated.items() if name in QFormerFields.model_fields}
    parts = lavis_qformer(own, vision, file) | words
    queries, kind = source.get("num_query", 32), source.get("mm_projector_type", "linear")
    depth = re.fullmatch(r"mlp(\d{1,2})x_gelu", kind)
    if depth is None:
        raise CheckpointError(f"{file}: mm_projector_type is {kind!r}; supported for a LLaMA-VID is mlpNx_gelu")
    if source.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise CheckpointError(
            f"{file}: mm_hidden_size is {source['mm_hidden_size']}, and EVA's tower has {vision.hidden_size}"
        )
    compress = source.get("compress_type")
    if compress is None or compress == "mean":
        grid = None if compress is None else 1
    elif (match := re.fullmatch(r"grid:(\d{1,3})", compress)) and int(match[1]) > 1:
        grid = int(match[1])
    else:
        raise CheckpointError(
            f"{file}: compress_type is {compress!r}; supported are null, 'mean' and 'grid:N' with N > 1"
        )
    try:
        return ContextContentConfig(
            QFormerConfig(**parts, out_features=vision.feature_size, queries=queries),
            ProjectorConfig("mlp", vision.feature_size, out_features, int(depth[1])),
            vision.image_size // vision.patch_size,
            grid,
        )
    except ValueError as problem:
        raise CheckpointError(f"{file}: {problem}") from problem


def _words(qformer: QFormerConfig) -> dict[str, Any]:
    return {"vocab_size": qformer.vocabulary, "max_position_embeddings": qformer.positions}


def _interpolated(stored: StoredTensor, own: int, side: int) -> torch.Tensor:
    """[1, 1 + own^2, C] -> [1, 1 + side^2, C]; the class row's stays."""
    table = stored.load()
    planes = table[:, 1:].float().unflatten(1, (own, own)).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1].float(), planes.flatten(2).transpose(1, 2)], dim=1).to(table.dtype)
