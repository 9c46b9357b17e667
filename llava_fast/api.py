"""The public API: `load` a checkpoint, `save` it, `count_tokens` of an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from llava_fast.checkpoints.assemble import Assembly, open_checkpoint
from llava_fast.checkpoints.device_map import plan_devices
from llava_fast.checkpoints.load import LoadedCheckpoint, Progress, load_weights, loaded_sizes
from llava_fast.checkpoints.save import NOTE_FILE
from llava_fast.checkpoints.templates import find_templates
from llava_fast.checkpoints.tokenizer import load_tokenizer
from llava_fast.errors import CheckpointError, QuantisationError
from llava_fast.families import family_of_config, fields
from llava_fast.families.preprocessing import check_tokens
from llava_fast.generation.llava import Llava
from llava_fast.inputs.chat.rendering import ChatTemplate, builtin_names, builtin_template, checkpoint_template
from llava_fast.inputs.instructions import Instructions
from llava_fast.inputs.options import ProcessorOptions
from llava_fast.inputs.pictures.preprocessing import FILTERS
from llava_fast.inputs.pictures.tiles import TORCH_MODES
from llava_fast.inputs.processor import Processor
from llava_fast.inputs.tiling.anyres import Compat, count_image_rows
from llava_fast.models.config import LlavaConfig, RetrievalConfig
from llava_fast.models.eight_bit import check_precision, use_precision
from llava_fast.models.fused import merge_linears
from llava_fast.models.quantised import Quantisation
from llava_fast.ops import cached_rows
from llava_fast.storage.files import check_fields, parse_json
from llava_fast.storage.hub import resolve
from llava_fast.storage.tensor_files import WEIGHT_DTYPES


def load(
    path_or_hub_id: str | Path | Assembly,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    chat_template: str | None = None,
    processor: ProcessorOptions | None = None,
    model_base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    merge: bool | None = None,
    device_map: Literal["auto"] | Sequence[torch.device | str] | None = None,
    cuda_graphs: bool = True,
    quantize: Quantisation | str | None = None,
    kv_cache: str | None = None,
    precision: str | None = None,
    progress: Progress = list,
) -> Llava:
    """Load a Hugging Face or original LLaVA checkpoint for inference; or build a model to train from a language model
    and a vision tower (see checkpoints.assemble).

    device         default: the first CUDA device if there is one, else the CPU.
    dtype          torch dtype or its name; "auto": the checkpoint's. Default: "auto", but float32 on a CPU.
    chat_template  name of a built-in template (see inputs.chat.formats), or of one of the checkpoint's templates.
                   Default: the checkpoint's template named "default".
    processor      options for images and videos that the checkpoint does not determine (see ProcessorOptions).
    model_base     the model that a LoRA or projector-only directory was trained on.
    vision_tower   location of an original checkpoint's tower, if it differs from its config's.
    merge          one weight for query, key and value and one for gate and up, so that each is one product (see
                   models.fused.merge_linears). Default: on CUDA. Pass False for training or adapters;
                   llava_fast.models.fused.split_linears undoes it. Saving always writes the separate weights.
    device_map     "auto": over as many of this machine's GPUs as the weights need (or a list of devices to use, in
                   order), the decoder's layers in order, everything else on the first. Not with `device`. Decoding
                   then runs layer by layer, without CUDA graphs; training runs take no such model.
    cuda_graphs    on CUDA, encode images and decode from CUDA graphs, whose captures take memory. False: not.
    quantize       "int8", "int4" or a Quantisation: quantise the decoder's Linears, its head and its embedding to 8 or
                   4 bits while loading (see docs/quantisation.md). A checkpoint that is already quantised is loaded as
                   stored, without this option.
    kv_cache       "int8": cache keys and values in 8 bits, with one scale for each row of a head, in about a quarter
                   of float32's memory (see docs/quantisation.md). Default: the decoder's dtype.
    precision      "int8" (CUDA from compute capability 8.0 on, or a CPU) or "fp8" (from 9.0 on, in bfloat16, or a CPU):
                   products of more than 256 rows (images, prompts) round both operands to 8 bits; on CUDA where
                   selection finds that faster, on a CPU always, where fp8 is the slower (see docs/quantisation.md).
                   Weights are kept in `dtype` too, with which answers are decoded, and which are saved. Not with
                   device_map. Default: products in `dtype`.
    progress       wraps the iteration over tensor names, such as tqdm.tqdm.

    Weights are memory-mapped and assigned tensor by tensor. Raises CheckpointError, naming file and tensor, and
    QuantisationError for an unsupported quantisation, BackendError for a precision that the device does not
    support.
    """
    if device is not None and device_map is not None:
        raise CheckpointError("give load a device or a device_map, not both")
    options = ProcessorOptions() if processor is None else processor
    if not isinstance(options, ProcessorOptions):
        raise CheckpointError(f"processor is {processor!r}: give a ProcessorOptions(...)")
    devices = _devices(device_map)
    device, quantisation = _device(devices[0] if devices else device), Quantisation.of(quantize)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    if kv_cache not in (None, "int8"):
        raise QuantisationError(f"kv_cache is {kv_cache!r}: use 'int8' or None")
    checkpoint, name = open_checkpoint(
        path_or_hub_id, dtype=_dtype(dtype), device=device, model_base=model_base, vision_tower=vision_tower
    )
    if isinstance(checkpoint.config, RetrievalConfig):
        raise CheckpointError(
            f"{path_or_hub_id} compares images and texts and has no language model: load it with "
            "llava_fast.load_retrieval, or give it one (llava_fast.assemble_stage_two)"
        )
    if precision is not None:
        if devices:
            raise CheckpointError("precision cannot be combined with device_map: leave one of them out")
        check_precision(precision, device, checkpoint.dtype)
    head_dim = checkpoint.config.decoder.head_dim
    if kv_cache is not None and head_dim % cached_rows.MULTIPLE:
        raise QuantisationError(f"kv_cache: heads of {head_dim} elements are not a multiple of 8: use None")
    if options.resample == "torchvision":
        _check_torchvision(checkpoint.config)
    with torch.device("meta"):
        reads = load_processor(checkpoint, name, chat_template).with_options(options)
        model = Llava(checkpoint.config, reads)
    layout = plan_devices(model, devices, loaded_sizes(model, checkpoint, quantisation)) if devices else None
    place = None if layout is None else layout.device_of
    load_weights(model, checkpoint, place, quantisation=quantisation, progress=progress)
    if layout is not None:
        layout.apply(model)
    if merge or (merge is None and device.type == "cuda"):
        merge_linears(model)
    model.decoder.cache_codes = kv_cache
    model.cuda_graphs = cuda_graphs
    model.eval()
    if precision is not None:
        use_precision(model, precision)
    return model


def _check_torchvision(config: LlavaConfig) -> None:
    for filter in {config.geometry.filter, config.geometry.frame_filter} - set(TORCH_MODES):
        raise CheckpointError(
            f"the checkpoint's processor resizes by {filter!r} (resample {FILTERS.index(filter)}), but torchvision "
            f"supports only {', '.join(TORCH_MODES)}: use resample='pillow'"
        )


def load_processor(checkpoint: LoadedCheckpoint, name: str, chat_template: str | None = None) -> Processor:
    """The checkpoint's tokenizer, geometry and chat template. name: the user's name for the checkpoint, by which the
    original LLaVA chooses a template. Raises CheckpointError without a tokenizer."""
    config = checkpoint.config
    family, instructions = family_of_config(config), None
    tokenizer = load_tokenizer(checkpoint.tokenizer_path, family.tokenizer_class)
    if config.layout == "hf":
        check_tokens(checkpoint.path, tokenizer, image_token=config.image_token_id, video_token=config.video_token_id)
    if family.connector_tokenizer is not None and config.projector.reads_text:
        folder = checkpoint.tokenizer_path / family.connector_tokenizer
        if family.connector_tokenizer_home is not None and not folder.is_dir():
            folder = resolve(family.connector_tokenizer_home)
        most, vocabulary = config.projector.text_limits
        cuts = family.question_tokens is not None
        most = min(most, family.question_tokens or most)
        instructions = Instructions(load_tokenizer(folder), most, vocabulary, cuts)
    return Processor(
        geometry=family.geometry(config, tokenizer),
        tokenizer=tokenizer,
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        template=_chat_template(checkpoint, name, tokenizer, chat_template),
        max_rows=config.decoder.context_length,
        vocabulary=config.decoder.vocab_size,
        images_before_bos=family.images_before_bos,
        frames_per_video=family.frames_per_video,
        answer_start=config.decoder.answer_start,
        instructions=instructions,
        repeats_images=family.repeats_images,
        video_fps=family.video_fps,
        routes=config.router is not None,
        exif=config.layout == "hf",
    )


def count_tokens(
    model_or_config: Llava | LlavaConfig,
    height: int,
    width: int,
    compat: Compat | None = None,
) -> int:
    """The number of visual tokens for an image of this size (pixels). `compat` reads the pinpoints as Hugging Face
    ("hf") or the original code ("llava") does; default: the checkpoint's. For a checkpoint with a router, which leaves
    out tokens by the prompt's text (SliME), it is the maximum. Raises ImageError for an empty image.
    """
    config = model_or_config if isinstance(model_or_config, LlavaConfig) else model_or_config.config
    geometry = config.geometry
    return count_image_rows(geometry.read_as(compat) if compat else geometry, height, width)


def _chat_template(checkpoint: LoadedCheckpoint, name: str, tokenizer: Any, asked: str | None) -> ChatTemplate:
    """The first of: the requested template (built-in, or the checkpoint's of that name), the one with which the
    checkpoint was trained here, the checkpoint's default, the one implied by its name and decoder. Raises
    CheckpointError for an existing template that cannot be used."""
    if asked is not None and asked in builtin_names():
        return builtin_template(asked)
    if asked is None and (trained_with := _trained_template(checkpoint)) is not None:
        return trained_with
    own = find_templates(checkpoint.path, tokenizer, checkpoint.tokenizer_path)
    if asked is not None and (own is None or asked not in own.sources):
        return builtin_template(asked)  # raises an error that lists the known names
    if own is not None and (asked is not None or checkpoint.config.layout == "hf"):
        origin = f"{own.file}: the chat template"
        return checkpoint_template(own.choose(asked or "default"), tokenizer.special_tokens_map, origin)
    family = family_of_config(checkpoint.config)
    return builtin_template(family.own_template(name, checkpoint.config, checkpoint.path))


def _trained_template(checkpoint: LoadedCheckpoint) -> ChatTemplate | None:
    """The built-in template with which this package trained the checkpoint, or None."""
    if NOTE_FILE not in checkpoint.side_files:
        return None
    file = checkpoint.path / NOTE_FILE
    note = parse_json(checkpoint.side_files[NOTE_FILE], file)
    check_fields(note, fields.Note, file)
    if (name := note.get("chat_template")) is None:
        return None
    if name not in builtin_names():
        raise CheckpointError(f"{file}: chat_template {name!r} is not a built-in template; give one by chat_template=")
    return builtin_template(name)


def _device(device: torch.device | str | None) -> torch.device:
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError):
        raise CheckpointError(f"device {device!r} is unknown: use 'cpu', 'cuda' or 'cuda:1'") from None
    if found.type == "meta":
        raise CheckpointError("device 'meta' holds no weights: use 'cpu', 'cuda' or 'cuda:1'")
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # no such GPU, no driver, a build of torch without CUDA
        why = (str(error).splitlines() or [repr(error)])[0]
        raise CheckpointError(f"device '{found}' cannot be used here ({why}): use another, such as 'cpu'") from None
    return found


def _devices(device_map: str | Sequence[torch.device | str] | None) -> list[torch.device]:
    """The devices of load's `device_map`; none without one, or with "auto" on a machine without a GPU."""
    if device_map is None:
        return []
    if isinstance(device_map, str):
        if device_map != "auto":
            raise CheckpointError(f"device_map must be 'auto' or a list of devices, got {device_map!r}")
        return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if isinstance(device_map, dict):
        raise CheckpointError(f"device_map must be 'auto' or a list of devices, got {device_map!r}")
    if not device_map:
        raise CheckpointError("device_map lists no device")
    return [_device(each) for each in device_map]


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in WEIGHT_DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not supported: use 'float32', 'bfloat16' or 'float16'")
    return found
