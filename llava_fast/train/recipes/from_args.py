"""`llava-fast recipe from-args`: converts the command line of an original LLaVA training to a recipe.

Sources: the argument classes of haotian-liu/LLaVA c121f04 and LLaVA-VL/LLaVA-NeXT df17966 (llava/train/train.py,
train_dpo.py), with their defaults and effects there; transformers' TrainingArguments for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llava_fast.errors import RecipeError, RequestError
from llava_fast.train.recipe import parse_recipe
from llava_fast.train.recipes.shell_script import read_command

# Arguments that do not change what the original computes, each with the reason why it can be dropped.
_NO_MEANING = {
    "deepspeed": "processes share weights by FSDP2 under torchrun (`parallel`)",
    "fsdp": "as for deepspeed",
    "fsdp_config": "as for deepspeed",
    "local_rank": "torchrun says it",
    "lazy_preprocess": "always so",
    "attn_implementation": "chosen by llava_fast; `llava-fast doctor` says which",
    "mpt_attn_impl": "as for attn_implementation",
    "torch_compile": "not part of a recipe",
    "torch_compile_backend": "not part of a recipe",
    "ddp_find_unused_parameters": "never needed",
    "logging_steps": "every step is logged",
    "verbose_logging": "every step is logged",
    "run_name": "runs are distinguished by `output`",
    "save_strategy": "checkpoints are written every `checkpoints.every` steps",
    "save_safetensors": "always so",
    "evaluation_strategy": "nothing is evaluated during training",
    "eval_strategy": "nothing is evaluated during training",
    "per_device_eval_batch_size": "nothing is evaluated during training",
    "remove_unused_columns": "unknown keys are ignored",
    "is_multimodal": "always so",
    "cache_dir": "HF_HOME sets the download directory",
    "double_quant": "for quantised weights only",
    "quant_type": "for quantised weights only",
    "lora_weight_path": "the original does not read it either",
    "group_by_varlen": "packing needs no groups",
    "dataloader_pin_memory": "always so",
    "mm_use_im_patch_token": "adds a token that no prompt uses",
    "image_crop_resolution": "read by the highres_crop aspect only",
    "image_split_resolution": "read by the highres_crop aspect only",
    "mm_spatial_pool_out_channels": "the tower's width",
    "generate_during_eval": "nothing is evaluated during training",
    "precompute_ref_log_probs": "`dpo.reference: precomputed` does this",
}
_OFF = {  # arguments that are supported only with the value that disables them
    "mm_use_im_start_end": False,
    "fp16": False,
    "freeze_mm_vision_resampler": False,
    "tune_mm_vision_resampler": False,
    "force_sample": False,
    "early_mix_text": False,
    "s2": False,
    "enable_ring_attention": False,
    "group_by_modality_length_auto": False,
    "auto_find_batch_size": False,
    "lora_bias": "none",
    "gradient_checkpointing_kwargs": None,
    "dpo_alpha": 1.0,
    "video_fps": 1,
    "bits": 16,
}
_SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
_OPTIMIZERS = {"adamw_torch": "float32", "adamw_torch_fused": "float32", "adamw_hf": "float32"}
_OPTIMIZERS |= {"adamw_bnb_8bit": "8bit", "adamw_8bit": "8bit"}


def recipe_from_args(words: Sequence[str], gpus: int | None = None) -> str:
    """YAML of the recipe equivalent to a training command.

    words  the command (deepspeed, torchrun or python, a train script and its arguments), or the path of a shell script
           with the command.
    gpus   the number of GPUs; default: the command's.
    Raises RecipeError for a command that is not a LLaVA training, lacks required arguments, or does not state its
    number of GPUs.
    """
    command = read_command(words)
    gpus = gpus or command.gpus
    if gpus is None:
        raise RecipeError("the command does not state its number of GPUs, on which the batch size depends: --gpus 8")
    args = Arguments(command.arguments)
    for name, value in args.given.items():
        if "$" in value:
            args.note(f"{name} {value}: a variable that the script does not set; write its value")
    if "offload" in args.given.get("deepspeed", ""):
        args.note(f"deepspeed {args.given['deepspeed']}: nothing is offloaded to the host here")
    given = _recipe(args, gpus, is_dpo="dpo" in Path(command.script).name)
    parse_recipe(given, "the command's recipe")
    return _written(given, args, [f"Made by `llava-fast recipe from-args` from {command.script}, on {gpus} GPUs."])


class Arguments:
    """The command's arguments. Each is taken once; arguments that are changed or never taken are recorded."""

    def __init__(self, given: dict[str, str]) -> None:
        self.given = given
        self.left = dict(given)
        self.notes: list[str] = []

    def take(self, name: str, default: Any = None) -> Any:
        """An argument's value, converted to the default's type, or parsed as YAML without a default."""
        if name not in self.given:
            return default
        text = self.left.pop(name, self.given[name])
        if isinstance(default, bool):
            if text.lower() not in ("true", "false", "1", "0", "yes", "no", ""):
                raise RecipeError(f"--{name} {text}: must be True or False")
            return text.lower() in ("true", "1", "yes", "")
        if isinstance(default, (int, float)):
            try:
                return type(default)(text)
            except ValueError:
                raise RecipeError(f"--{name} {text!r}: must be a number") from None
        return None if text in ("None", "") else text

    def number(self, name: str) -> float | None:
        """A number that has no default."""
        return self.take(name, 0.0) if name in self.given else None

    def note(self, text: str) -> None:
        self.notes.append(text)


def _recipe(args: Arguments, gpus: int, is_dpo: bool) -> dict[str, Any]:
    is_next = is_dpo or any(
        name in args.given
        for name in ("mm_tunable_parts", "mm_vision_tower_lr", "mm_patch_merge_type", "frames_upbound")
    )
    output = args.take("output_dir")
    if output is None:
        raise RecipeError("the command has no --output_dir, which transformers' TrainingArguments need")
    micro, accumulation = args.take("per_device_train_batch_size", 8), args.take("gradient_accumulation_steps", 1)
    lora = _lora(args)
    given: dict[str, Any] = {
        "model": _model(args),
        "output": output,
        "trainable": _trainable(args, lora is not None),
        **({"lora": lora} if lora else {}),
        **({"dpo": _dpo(args)} if is_dpo else {}),
        "data": _data(args, is_next, is_dpo),
        "optimizer": _optimizer(args),
        "batch_size": micro * accumulation * gpus,
        "micro_batch": micro,
        "epochs": args.take("num_train_epochs", 3.0),
        # The original averages the means of micro-batches.
        "loss_average": "step" if is_dpo else "micro_batch",
        "precision": "bfloat16" if args.take("bf16", False) else "float32",
        "tf32": args.take("tf32", False),
        "recompute": "layers" if args.take("gradient_checkpointing", is_next) else "none",
        "checkpoints": {"every": args.take("save_steps", 500)},
        "seed": args.take("seed", 42),
    }
    if is_dpo:
        given.pop("micro_batch")
        args.note("pairs longer than max_length are left out; the original truncated their answers")
        args.note("batch_size counts pairs; pairs are packed, so per_device_train_batch_size is not used")
    if (steps := args.take("max_steps", -1)) > 0:
        given["steps"] = steps
    if (keep := args.number("save_total_limit")) is not None:
        given["checkpoints"]["keep"] = int(keep)
    reports = str(args.take("report_to") or "")
    given["tensorboard"] = "tensorboard" in reports or reports == "all"
    if "wandb" in reports or reports == "all":
        given["wandb"] = "llava"
        args.note("wandb: the project was named by the environment (WANDB_PROJECT); put its name here")
    if args.take("dataloader_drop_last", False):
        args.note("dataloader_drop_last True: not supported; an epoch's last, smaller step runs as with False")
    return given


def _model(args: Arguments) -> str | dict[str, Any]:
    path, tower = args.take("model_name_or_path"), args.take("vision_tower")
    if path is None:
        raise RecipeError("the command has no --model_name_or_path")
    if tower is None:
        args.note("without vision_tower the original trains a language model alone; here model must be a LLaVA")
        return path
    model: dict[str, Any] = {
        "decoder": path,
        "vision_tower": tower,
        "projector": args.take("mm_projector_type") or "linear",
        "feature_layer": args.take("mm_vision_select_layer", -1),
        "aspect": args.take("image_aspect_ratio") or "square",
        "merge": args.take("mm_patch_merge_type") or "flat",
    }
    feature = args.take("mm_vision_select_feature") or "patch"
    if feature != "patch":
        model["feature"] = feature
    if projector := args.take("pretrain_mm_mlp_adapter"):
        model["projector_from"] = projector
    if pinpoints := args.take("image_grid_pinpoints"):
        model["pinpoints"] = _pinpoints(pinpoints)
    stride, mode = args.number("mm_spatial_pool_stride"), args.take("mm_spatial_pool_mode")
    if stride is not None:
        model |= {"video_pool": mode or "average", "video_pool_stride": int(stride)}
    if newline := args.take("mm_newline_position"):
        model["video_newline"] = newline
    if (resampler := args.take("mm_resampler_type")) is not None:
        if resampler == "spatial_pool":
            model["video_pool_stage"] = "before"
        else:
            args.note(f"mm_resampler_type {resampler}: there is no such resampler here")
    factor, kind = args.number("rope_scaling_factor"), args.take("rope_scaling_type")
    if factor is not None and kind is not None:
        model["rope"] = {"kind": kind, "factor": factor}
    elif factor is not None or kind is not None:
        args.note("rope_scaling_factor and rope_scaling_type only have an effect together, as in the original")
    args.note(f"if {path} is a LLaVA already, write `model: {path}` instead of the parts below")
    return model


def _pinpoints(text: str) -> str | list[list[int]]:
    """The original's text as (width, height) pairs, or unchanged if it is a range of grids."""
    if "x" in text:
        return text
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return [list(pair) for pair in zip(numbers[::2], numbers[1::2], strict=False)]


def _trainable(args: Arguments, lora: bool) -> list[str]:
    """The parts that the original does not freeze. Its newline row is part of the language model."""
    newline = "unpad" in args.given.get("mm_patch_merge_type", "")
    projector = "projector.*" if newline else "projector"  # the pattern excludes the newline row
    adapter = args.take("tune_mm_mlp_adapter", False)
    frozen_projector = args.take("freeze_mm_mlp_adapter", False)
    frozen_backbone = args.take("freeze_backbone", False)
    tower = args.take("unfreeze_mm_vision_tower", False)
    args.take("unfreeze_language_model", False)  # declared in LLaVA-NeXT but never read
    if (listed := args.take("mm_tunable_parts")) is not None:
        parts = [part.strip() for part in listed.split(",")]
        known = {"mm_vision_tower", "mm_mlp_adapter", "mm_language_model"}
        for part in parts:
            if part not in known:
                args.note(f"mm_tunable_parts: {part} is not a part here")
        decoder, tower = "mm_language_model" in parts, "mm_vision_tower" in parts
        chosen = ["vision_tower"] * tower
        if "mm_mlp_adapter" in parts:
            chosen.append("projector" if decoder else projector)
        elif decoder and newline:
            chosen.append("image_newline")
        return chosen + ["decoder"] * (decoder and not lora)
    if adapter:
        return ["vision_tower"] * tower + [projector]
    chosen = ["vision_tower"] * tower + (["image_newline"] * newline if frozen_projector else ["projector"])
    if frozen_backbone:
        return [*chosen, "decoder.lm_head.*"]  # the original does not freeze the head
    return chosen + ["decoder"] * (not lora)


def _lora(args: Arguments) -> dict[str, Any] | None:
    names = {"lora_r": 64, "lora_alpha": 16.0, "lora_dropout": 0.05}
    values = {name: args.take(name, default) for name, default in names.items()}
    if not args.take("lora_enable", False):
        return None
    return {"rank": values["lora_r"], "alpha": values["lora_alpha"], "dropout": values["lora_dropout"]}


def _dpo(args: Arguments) -> dict[str, Any]:
    return {"beta": args.take("beta", 0.1), "sft_weight": args.take("gamma", 1.0), "reference": "precomputed"}


def _data(args: Arguments, is_next: bool, is_dpo: bool) -> dict[str, Any]:
    path = args.take("data_path")
    if path is None:
        raise RecipeError("the command has no --data_path")
    images, videos = args.take("image_folder"), args.take("video_folder")
    source = {"path": path, **({"images": images or videos} if images or videos else {})}
    if videos and images and videos != images:
        args.note(f"video_folder {videos}: videos are looked for in the source's `images` folder; use one for both")
    data: dict[str, Any] = {
        "sources": [source],
        "label_mask": "answers" if is_dpo else "original",
        "max_length": args.take("model_max_length", 4096 if is_next else 512),
        "too_long": "drop" if is_dpo else "cut",
        "batching": "packed" if is_dpo else "padded",
        "workers": args.take("dataloader_num_workers", 0),
    }
    if args.take("group_by_modality_length", False) and not is_dpo:
        data["batching"] = "grouped"
    if (frames := args.take("frames_upbound", 0)) > 0:
        data["video_frames"] = frames
        if not args.take("force_sample", False):
            args.note("the original takes one frame per second of a video shorter than frames_upbound seconds")
    if args.take("add_time_instruction", False):
        data["time_instruction"] = True
    version = args.take("version") or "v0"
    if (template := _template(version)) is not None:
        data["template"] = template
    else:
        args.note(f"version {version}: unknown template; the checkpoint's is used unless you name one")
    return data


def _template(version: str) -> str | None:
    from llava_fast.inputs.chat.rendering import builtin_template

    try:
        return builtin_template(version).name
    except RequestError:
        return None


def _optimizer(args: Arguments) -> dict[str, Any]:
    settings: dict[str, Any] = {"learning_rate": args.take("learning_rate", 5e-5)}
    names = {"projector": "mm_projector_lr", "vision_tower": "mm_vision_tower_lr"}
    rates = {part: rate for part, name in names.items() if (rate := args.number(name)) is not None}
    if rates:
        settings["rates"] = rates
    schedule = args.take("lr_scheduler_type") or "linear"
    if schedule not in _SCHEDULES:
        args.note(f"lr_scheduler_type {schedule}: supported are {', '.join(_SCHEDULES)}; cosine is used")
        schedule = "cosine"
    warmup = args.take("warmup_ratio", 0.0)
    if (steps := args.take("warmup_steps", 0)) > 0:
        if (total := int(args.given.get("max_steps", 0))) > 0:
            warmup = steps / total
        else:
            args.note(f"warmup_steps {steps}: write optimizer.warmup as their share of all steps")
    settings |= {"schedule": schedule, "warmup": warmup, "weight_decay": args.take("weight_decay", 0.0)}
    betas = [args.take("adam_beta1", 0.9), args.take("adam_beta2", 0.999)]
    if betas != [0.9, 0.999]:
        settings["betas"] = betas
    if (eps := args.take("adam_epsilon", 1e-8)) != 1e-8:
        settings["eps"] = eps
    settings["clip"] = args.take("max_grad_norm", 1.0) or None  # in transformers 0 means no clipping
    optimizer = args.take("optim") or "adamw_torch"
    if optimizer not in _OPTIMIZERS:
        args.note(f"optim {optimizer}: AdamW is used")
    settings["states"] = _OPTIMIZERS.get(optimizer, "float32")
    return settings


def _written(given: dict[str, Any], args: Arguments, head: list[str]) -> str:
    """The recipe's YAML after comments about the command's other arguments."""
    unknown, without = [], []
    for name, value in dict(args.left).items():
        shown = f"--{name} {value}".rstrip()
        if name in _OFF and args.take(name, _OFF[name]) == _OFF[name]:
            continue
        if name == "bits":
            unknown.append(
                f"{shown}: bitsandbytes' formats are not supported; LoRA runs over {given['precision']} weights, or "
                "set `quantize: int8` or `int4`"
            )
        elif name == "fp16":
            unknown.append(f"{shown}: set precision to bfloat16 or float32")
        elif name in _NO_MEANING:
            without.append(f"{shown}: {_NO_MEANING[name]}")
        else:
            unknown.append(f"{shown}: not supported")
    lines = list(head)
    for title, listed in (
        ("Look at these:", args.notes),
        ("NOT CARRIED OVER:", unknown),
        ("Without meaning here:", without),
    ):
        if listed:
            lines += ["", title, *(f"  {each}" for each in listed)]
    comments = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return comments + yaml.dump(given, Dumper=_Dumper, sort_keys=False, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes floats such that YAML reads them as floats (1.0e-05), and short lists in one line."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, _flat(value))
)


def _flat(value: list) -> bool:
    return not any(isinstance(each, dict) for each in value)
