"""Image-text retrieval with BLIP-2's first stage: `load_retrieval`, and new models for both of its stages.

model = llava_fast.load_retrieval("Salesforce/blip2-itm-vit-g")
model.contrastive(["cat.jpg", "dog.jpg"], ["a cat", "a dog"])   # similarities [images, texts]
model.matching(["cat.jpg"], ["a cat"])                          # probabilities [images, texts]
"""

from __future__ import annotations

from pathlib import Path

import torch

from llava_fast.checkpoints.load import LoadedCheckpoint, load_weights
from llava_fast.checkpoints.retrieval import begin_stage_one, begin_stage_two, open_stage_one
from llava_fast.checkpoints.save import check_destination, save
from llava_fast.checkpoints.tokenizer import load_tokenizer
from llava_fast.errors import CheckpointError
from llava_fast.inputs.chat.rendering import builtin_template
from llava_fast.inputs.options import ProcessorOptions
from llava_fast.inputs.processor import Processor
from llava_fast.models.config import LlavaConfig, RetrievalConfig
from llava_fast.models.connectors.qformer import QFormerConfig
from llava_fast.models.retrieval import RetrievalModel
from llava_fast.models.vlm import LlavaModel
from llava_fast.storage.hub import resolve

FIRST_WORD = "[DEC]"


def load_retrieval(
    path_or_hub_id: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    processor: ProcessorOptions | None = None,
) -> RetrievalModel:
    """Load a checkpoint in the layout of transformers' Blip2ForImageTextRetrieval.

    device     default: the first CUDA device if there is one, else the CPU.
    dtype      default: the checkpoint's, but float32 on a CPU.
    processor  options for images that the checkpoint does not determine.

    Raises CheckpointError, naming file and tensor. A caption head or temperature that the checkpoint lacks (published
    ones do) are new; only training uses them.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None and place.type == "cpu":
        dtype = torch.float32
    checkpoint = open_stage_one(path_or_hub_id, dtype, place)
    return _built(checkpoint, load_tokenizer(checkpoint.tokenizer_path), processor)


def load_retrieval_processor(path_or_hub_id: str | Path) -> Processor:
    """The processor of `load_retrieval`, without reading weights. Raises CheckpointError."""
    checkpoint = open_stage_one(path_or_hub_id)
    return _processor(checkpoint.config, load_tokenizer(checkpoint.tokenizer_path))


def assemble_stage_one(
    path: str | Path,
    text_encoder: str | Path,
    vision_tower: str | Path,
    queries: int = 32,
    cross_every: int = 2,
    features: int = 256,
    seed: int = 0,
) -> None:
    """Write a new model for stage 1 to a directory: the tower of a BLIP-2, and a Q-Former that begins with a BERT
    (arguments as for checkpoints.retrieval.begin_stage_one). Raises CheckpointError."""
    check_destination(path)
    tokenizer = load_tokenizer(resolve(text_encoder))
    if tokenizer.bos_token_id is None:
        tokenizer.add_special_tokens({"bos_token": FIRST_WORD})
    for name in ("cls_token_id", "sep_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise CheckpointError(f"{text_encoder}: the tokenizer has no {name.removesuffix('_id')}, as BERT's has")
    made = begin_stage_one(text_encoder, vision_tower, len(tokenizer), queries, cross_every, features, seed)
    save(_built(made, tokenizer), path)


def assemble_stage_two(path: str | Path, stage_one: str | Path, decoder: str | Path, seed: int = 0) -> None:
    """Write a new BLIP-2 for stage 2 to a directory: tower and queries of a model of stage 1, and a language model with
    its tokenizer, which gets a token <image> if it has none. Raises CheckpointError."""
    from transformers import AddedToken

    check_destination(path)
    tokenizer = load_tokenizer(resolve(decoder))
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    made = begin_stage_two(stage_one, decoder, image_token, seed)
    config = made.config
    with torch.device("meta"):
        reads = Processor(config.geometry, tokenizer, image_token, builtin_template("blip2"))
        model = LlavaModel(config, reads)
    load_weights(model, made)
    save(model, path)


def _built(checkpoint: LoadedCheckpoint, tokenizer: object, options: ProcessorOptions | None = None) -> RetrievalModel:
    config = checkpoint.config
    assert isinstance(config, RetrievalConfig)
    reads = _processor(config, tokenizer).with_options(options or ProcessorOptions())
    with torch.device("meta"):
        model = RetrievalModel(config, reads)
    load_weights(model, checkpoint)
    return model.eval()


def _processor(config: LlavaConfig, tokenizer: object) -> Processor:
    """The tokenizer is the Q-Former's, and so is the vocabulary."""
    assert isinstance(config.projector, QFormerConfig)
    return Processor(
        geometry=config.geometry,
        tokenizer=tokenizer,
        image_token_id=config.image_token_id,
        template=builtin_template("plain"),
        max_rows=config.decoder.max_positions,
        vocabulary=config.projector.vocabulary,
    )
