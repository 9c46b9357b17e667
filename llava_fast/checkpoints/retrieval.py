"""Checkpoints of BLIP-2's two stages: those without a decoder (families.blip2_retrieval), and new models of either
stage from their parts.

Stage 1 begins with BERT and a tower: the text's feed-forward layers also begin the queries', and cross-attention is
new. Stage 2 takes tower and queries of stage 1 and gets a language model. Source: salesforce/LAVIS 506965b blip2.py
(init_Qformer), blip2_qformer.py, blip2_opt.py.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_fast.checkpoints.load import LoadedCheckpoint, load_checkpoint, tied_as_stored
from llava_fast.checkpoints.save import read_side_files
from llava_fast.errors import CheckpointError
from llava_fast.families.blip2 import Blip2
from llava_fast.families.blip2_retrieval import NAME, NO_IMAGE_TOKEN
from llava_fast.families.names import HEAD
from llava_fast.families.parts import tower_fields
from llava_fast.models.config import LlavaConfig, RetrievalConfig
from llava_fast.models.connectors.qformer import QFormerConfig
from llava_fast.models.connectors.retrieval_qformer import RetrievalQFormerConfig
from llava_fast.models.decoders.none import NoDecoderConfig
from llava_fast.storage.bounds import Positive, Size
from llava_fast.storage.files import Fields, check_fields, read_json
from llava_fast.storage.hub import resolve
from llava_fast.storage.tensor_files import StoredTensor, open_weights

logger = logging.getLogger("llava_fast.checkpoints")
_OPTIONAL = ("projector.cls.", "projector.temperature")
"""What transformers' class does not have."""
_BERT = re.compile(r"^(bert\.)?(embeddings|encoder|cls)\.")
_TEXT_SIDE = re.compile(
    r"projector\.(vision_projection|text_projection|itm_head|cls|temperature|embeddings\.(word|position)_embeddings"
    r"|encoder\.layer\.\d+\.(intermediate|output)\.)"
)
"""What stage 2 has no use for."""
_SPELLINGS = (
    ("attention.self.", "attention.attention."),
    ("embeddings.LayerNorm.", "embeddings.layernorm."),
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    ("layernorm.gamma", "layernorm.weight"),
    ("layernorm.beta", "layernorm.bias"),
)
"""(of BERT's tensors, ours)."""


class _Bert(Fields):
    """config.json of a BERT."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    max_position_embeddings: Size
    hidden_act: str
    layer_norm_eps: Positive


def open_stage_one(
    path_or_hub_id: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LoadedCheckpoint:
    """A checkpoint in the layout of Blip2ForImageTextRetrieval, with its weights still on disk. Where it has no caption
    head or temperature, they are new. Raises CheckpointError."""
    checkpoint = load_checkpoint(path_or_hub_id, dtype, device)
    if not isinstance(checkpoint.config, RetrievalConfig):
        raise CheckpointError(
            f"{path_or_hub_id} is no Blip2ForImageTextRetrieval but a {checkpoint.config.model_type}: llava_fast.load "
            "loads it"
        )
    fresh = _fresh(checkpoint.config, seed=0)
    lacks = [name for name in fresh if name.startswith(_OPTIONAL) and name not in checkpoint.tensors]
    if lacks:
        logger.info("%s has no caption head or temperature: training begins with new ones", path_or_hub_id)
    return dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, **{name: fresh[name] for name in lacks}})


def begin_stage_one(
    text_encoder: str | Path,
    vision_tower: str | Path,
    vocabulary: int,
    queries: int = 32,
    cross_every: int = 2,
    features: int = 256,
    seed: int = 0,
) -> LoadedCheckpoint:
    """A new model for stage 1, in float32.

    text_encoder  a BERT in transformers' layout. Its feed-forward layers also begin the queries'; its embedding of
                  segments is left out, as in LAVIS. `vocabulary`: rows of the embedding, with [DEC]'s.
    vision_tower  a BLIP-2 in transformers' layout, whose tower is taken.
    queries, cross_every, features  of the Q-Former: its queries, the layers from one that attends to the image to the
                  next, the width of what is compared. `seed`: for initialising what is new.
    Raises CheckpointError.
    """
    home, tower = resolve(text_encoder), load_checkpoint(vision_tower)
    file = home / "config.json"
    source = read_json(file)
    if (kind := source.get("model_type")) != "bert":
        raise CheckpointError(f"{file}: model_type is {kind!r}: the text encoder must be a bert")
    check_fields({name: source.get(name) for name in _Bert.model_fields}, _Bert, file, sparse=False)
    connector = tower.config.projector
    if not isinstance(connector, QFormerConfig):
        raise CheckpointError(f"{vision_tower} is no BLIP-2, whose tower stage 1 begins with")
    try:
        qformer = RetrievalQFormerConfig(
            in_features=connector.in_features,
            out_features=features,
            rows=connector.rows,
            queries=queries,
            hidden_size=source["hidden_size"],
            intermediate_size=source["intermediate_size"],
            num_layers=source["num_hidden_layers"],
            num_heads=source["num_attention_heads"],
            cross_every=cross_every,
            activation=source["hidden_act"],
            layer_norm_eps=source["layer_norm_eps"],
            vocabulary=vocabulary,
            positions=source["max_position_embeddings"],
        )
    except ValueError as problem:
        raise CheckpointError(f"{file}: {problem}") from problem
    config = RetrievalConfig(
        vision=tower.config.vision,
        projector=qformer,
        geometry=dataclasses.replace(tower.config.geometry, tile_rows=queries),
        decoder=NoDecoderConfig(hidden_size=features, max_positions=queries + qformer.positions),
        layout="hf",
        model_type=NAME,
        image_token_id=NO_IMAGE_TOKEN,
    )
    tensors = _fresh(config, seed)
    tensors |= {name: each for name, each in tower.tensors.items() if name.startswith("vision_tower.")}
    tensors |= _from_bert(open_weights(home), tensors, file)
    return LoadedCheckpoint(home, home, config, tensors, torch.float32, torch.device("cpu"), _pictures(tower.path))


def begin_stage_two(stage_one: str | Path, decoder: str | Path, image_token: int, seed: int = 0) -> LoadedCheckpoint:
    """A new BLIP-2 of the tower and queries of stage 1 and a language model, in the language model's dtype. Its
    Q-Former has no text side, as in transformers; the projection is new.

    decoder      a language model in transformers' layout. `image_token`: the id of <image>, for which the embedding is
                 extended if it has no such row; new rows are the mean of the others.
    Raises CheckpointError.
    """
    first, home = open_stage_one(stage_one), resolve(decoder)
    text = read_json(home / "config.json")
    tensors = _language_model(home)
    config = tied_as_stored(_described(first, text), tensors)
    if config.decoder.tie_embeddings:
        tensors.pop(HEAD, None)
    if config.embedding not in tensors:
        raise CheckpointError(f"{home} has no token embedding under the name that a {text.get('model_type')} gives it")
    if (rows := max(image_token + 1, config.decoder.vocab_size)) > config.decoder.vocab_size:
        config = tied_as_stored(_described(first, text | {"vocab_size": rows}), tensors)
        for name in (config.embedding, HEAD):
            if name in tensors:
                tensors[name] = _with_rows(tensors[name], rows)
    config = dataclasses.replace(config, image_token_id=image_token)
    config = dataclasses.replace(config, source={**config.source, "image_token_index": image_token})
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        width = config.projector.hidden_size if isinstance(config.projector, QFormerConfig) else 0
        projection = nn.Linear(width, config.width)
    for name, value in projection.named_parameters():
        place = f"projector.language_projection.{name}"
        tensors[place] = StoredTensor.of(Path("fresh"), place, value.detach())
    for name, tensor in first.tensors.items():
        if not _TEXT_SIDE.match(name):
            tensors[name.replace("projector.embeddings.layernorm.", "projector.layernorm.")] = tensor
    dtype = tensors[config.embedding].dtype
    return LoadedCheckpoint(home, home, config, tensors, dtype, torch.device("cpu"), _pictures(first.path))


def _described(first: LoadedCheckpoint, text: dict[str, Any]) -> LlavaConfig:
    """The config of a BLIP-2 with this language model, whose config.json is `text`."""
    made = first.config.projector
    assert isinstance(made, RetrievalQFormerConfig)
    source = {
        "architectures": [Blip2.architecture],
        "model_type": Blip2.model_types[0],
        "image_token_index": 0,
        **Blip2().connector_fields(first.config),
        "vision_config": tower_fields(first.config.vision),
        "text_config": {name: value for name, value in text.items() if name != "architectures"},
    }
    return Blip2().read(source, first.path)


def _language_model(home: Path) -> dict[str, StoredTensor]:
    """The tensors of a language model's own repository under our names. Some files hold the base model alone, without
    "model." before its names (facebook/opt-2.7b)."""
    stored = open_weights(home)
    bare = not any(key.startswith(("model.", "shared.")) for key in stored)
    in_blip2 = {
        f"language_model.{'model.' if bare and not key.startswith('lm_head.') else ''}{key}": each
        for key, each in stored.items()
    }
    return Blip2.names.name_tensors(in_blip2)


def _with_rows(stored: StoredTensor, rows: int) -> StoredTensor:
    table = stored.load()
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return StoredTensor.of(stored.file, stored.key, torch.cat([table, mean.expand(rows - len(table), -1)]))


def _pictures(path: Path) -> dict[str, str]:
    """The image processor's file."""
    return {name: text for name, text in read_side_files(path).items() if name == "preprocessor_config.json"}


def _from_bert(stored: Mapping[str, StoredTensor], fresh: Mapping[str, StoredTensor], file: Path) -> dict[str, Any]:
    """BERT's tensors under our names, its feed-forward layers also as those of the queries. Where the vocabulary is
    larger here, further rows are the new ones."""
    found: dict[str, StoredTensor] = {}
    for key, given in stored.items():
        name = "projector." + key.removeprefix("bert.")
        for theirs, ours in _SPELLINGS:
            name = name.replace(theirs, ours)
        if not _BERT.match(key) or name not in fresh:
            continue
        longer = name.endswith(("word_embeddings.weight", "predictions.bias"))
        tensor = _longer(given, fresh[name]) if longer else given
        if tensor.shape != fresh[name].shape:
            raise CheckpointError(f"{tensor.file}: {key!r} has shape {list(tensor.shape)}, which {file} denies")
        found[name] = tensor
        for text in ("intermediate", "output"):
            twin = re.sub(rf"(layer\.\d+)\.{text}\.", rf"\1.{text}_query.", name)
            if twin != name:
                found[twin] = dataclasses.replace(tensor, load=functools.partial(_copy, tensor))
    of_bert = (name for name in fresh if re.match(r"projector\.(embeddings|encoder)\.", name))
    if lacks := [name for name in of_bert if name not in found and "crossattention" not in name]:
        raise CheckpointError(f"{file.parent} is no whole BERT: it has nothing for {lacks[0]!r}")
    return found


def _copy(stored: StoredTensor) -> torch.Tensor:
    return stored.load().clone()


def _longer(stored: StoredTensor, fresh: StoredTensor) -> StoredTensor:
    """With the rows that `fresh` has more."""
    value, more = stored.load(), fresh.load()
    return StoredTensor.of(stored.file, stored.key, torch.cat([value, more[len(value) :].to(value.dtype)]))


def _fresh(config: RetrievalConfig, seed: int) -> dict[str, StoredTensor]:
    """New weights of the Q-Former as BERT's begin: normal with a deviation of 0.02, biases 0."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        qformer = config.projector.build()
        for module in qformer.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
    made = {f"projector.{name}": value.detach() for name, value in qformer.named_parameters()}
    return {name: StoredTensor.of(Path("fresh"), name, value) for name, value in made.items()}
