"""Original training commands as recipes: the meaning of each argument, and that nothing is dropped silently."""

import pytest
import yaml
from typer.testing import CliRunner

from llava_fast.cli import recipe as recipe_cli
from llava_fast.errors import RecipeError
from llava_fast.train.recipe import load_recipe
from llava_fast.train.recipes.from_args import recipe_from_args

LEAST = "--model_name_or_path vicuna --vision_tower clip --data_path d.json --output_dir out"


def words(more: str = "", launcher: str = "torchrun --nproc_per_node=8", script: str = "llava/train/train_mem.py"):
    return f"{launcher} {script} {LEAST} {more}".split()


def recipe(tmp_path, *args, **options):
    text = recipe_from_args(*args, **options)
    (tmp_path / "made.yaml").write_text(text)
    return load_recipe(tmp_path / "made.yaml"), text


STAGE2 = """#!/bin/bash
# LLaVA-1.5's second stage
MODEL=vicuna-7b-v1.5   # the decoder
export BASE="lmsys/${MODEL}"
CLEAN="${BASE//\\//_}"

deepspeed --num_gpus 4 llava/train/train_mem.py \\
    --deepspeed ./scripts/zero3.json \\
    --model_name_or_path $BASE --version v1 \\
    --data_path ./mix665k.json --image_folder ./data \\
    --vision_tower openai/clip-vit-large-patch14-336 \\
    --pretrain_mm_mlp_adapter ./checkpoints/$CLEAN/mm_projector.bin \\
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 \\
    --mm_use_im_start_end False --mm_use_im_patch_token False \\
    --image_aspect_ratio pad --group_by_modality_length True \\
    --bf16 True --output_dir ./checkpoints/$CLEAN-out \\
    --num_train_epochs 1 --per_device_train_batch_size 16 --gradient_accumulation_steps 2 \\
    --save_strategy "steps" --save_steps 50000 --save_total_limit 1 \\
    --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" \\
    --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True \\
    --dataloader_num_workers 4 --lazy_preprocess True --report_to wandb
"""


def test_stage_two_of_llava_15_from_its_script(tmp_path):
    (tmp_path / "finetune.sh").write_text(STAGE2)
    made, text = recipe(tmp_path, [str(tmp_path / "finetune.sh")])
    ours = load_recipe("llava-1.5-stage2")
    assert made.model.decoder == "lmsys/vicuna-7b-v1.5"
    assert made.model.projector_from == "./checkpoints/lmsys_vicuna-7b-v1.5/mm_projector.bin"
    assert made.model.model_copy(update={"projector_from": ours.model.projector_from}) == ours.model
    assert made.optimizer == ours.optimizer
    assert (made.batch_size, made.micro_batch, made.epochs, made.trainable) == (128, 16, 1, ours.trainable)
    assert (made.data.max_length, made.data.template, made.data.label_mask) == (2048, "vicuna_v1", "original")
    assert (made.data.batching, made.loss_average, made.data.too_long) == ("grouped", "micro_batch", "cut")
    assert (made.checkpoints.every, made.checkpoints.keep, made.wandb, made.tensorboard) == (50000, 1, "llava", False)
    assert (made.recompute, made.precision, made.tf32, made.seed) == ("layers", "bfloat16", True, 42)
    assert "NOT CARRIED OVER" not in text
    assert "--deepspeed ./scripts/zero3.json: " in text
    assert "--lazy_preprocess True: " in text


def test_defaults_are_those_of_the_original(tmp_path):
    made, _ = recipe(tmp_path, words("--bf16 True"))
    assert (made.model.projector, made.model.feature_layer, made.model.aspect) == ("linear", -1, "square")
    assert (made.data.max_length, made.epochs, made.batch_size, made.micro_batch) == (512, 3, 64, 8)
    settings = made.optimizer
    assert (settings.learning_rate, settings.schedule, settings.warmup, settings.clip) == (5e-5, "linear", 0.0, 1.0)
    assert (made.data.batching, made.recompute, made.tf32, made.trainable) == (
        "padded",
        "none",
        False,
        ["projector", "decoder"],
    )


NEXT = (
    "--mm_tunable_parts=mm_vision_tower,mm_mlp_adapter,mm_language_model --mm_vision_tower_lr=2e-6 --version qwen_1_5 "
    "--image_aspect_ratio anyres_max_9 --image_grid_pinpoints (1x1),...,(6x6) --mm_patch_merge_type spatial_unpad "
    "--mm_spatial_pool_stride 2 --mm_newline_position grid --frames_upbound 32 --rope_scaling_factor 2 "
    "--rope_scaling_type linear --attn_implementation sdpa --dataloader_drop_last True"
)


def test_llava_next(tmp_path):
    made, text = recipe(tmp_path, words(NEXT))
    assert made.trainable == ["vision_tower", "projector", "decoder"]
    assert made.optimizer.rates == {"vision_tower": 2e-6}
    assert (made.model.aspect, made.model.pinpoints, made.model.merge) == (
        "anyres_max_9",
        "(1x1),...,(6x6)",
        "spatial_unpad",
    )
    assert (made.model.video_pool, made.model.video_pool_stride, made.model.video_newline) == ("average", 2, "grid")
    assert (made.model.rope.kind, made.model.rope.factor) == ("linear", 2.0)
    assert (made.data.max_length, made.data.video_frames, made.data.template) == (4096, 32, "qwen")
    assert made.recompute == "layers"  # LLaVA-NeXT's default
    assert "dataloader_drop_last True: " in text


def test_the_time_instruction_of_llava_video(tmp_path):
    made, text = recipe(tmp_path, words(NEXT + " --add_time_instruction True --force_sample True"))
    assert made.data.time_instruction
    assert "time_instruction" not in text.split("model:")[0]
    assert "force_sample" not in text
    assert "a video shorter" not in text
    assert not recipe(tmp_path, words(NEXT + " --add_time_instruction False"))[0].data.time_instruction


@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        ("--tune_mm_mlp_adapter True", ["projector"]),
        ("--tune_mm_mlp_adapter", ["projector"]),
        ("--tune_mm_mlp_adapter True --mm_patch_merge_type spatial_unpad", ["projector.*"]),
        ("--freeze_mm_mlp_adapter True", ["decoder"]),
        ("--freeze_backbone True", ["projector", "decoder.lm_head.*"]),
        ("--unfreeze_mm_vision_tower True", ["vision_tower", "projector", "decoder"]),
        ("--mm_tunable_parts mm_mlp_adapter --mm_patch_merge_type spatial_unpad", ["projector.*"]),
        ("--mm_tunable_parts mm_language_model --mm_patch_merge_type spatial_unpad", ["image_newline", "decoder"]),
        ("--mm_tunable_parts mm_mlp_adapter,mm_language_model", ["projector", "decoder"]),
        ("--lora_enable True", ["projector"]),
    ],
)
def test_what_is_trained(tmp_path, arguments, trained):
    assert recipe(tmp_path, words(arguments))[0].trainable == trained


def test_lora_and_its_defaults(tmp_path):
    made, _ = recipe(tmp_path, words("--lora_enable True --mm_projector_lr 2e-5 --lora_alpha 256"))
    assert (made.lora.rank, made.lora.alpha, made.lora.dropout) == (64, 256, 0.05)
    assert made.optimizer.rates == {"projector": 2e-5}
    made, text = recipe(tmp_path, words("--lora_r 128"))
    assert made.lora is None
    assert "lora" not in text.replace("lora_fast", "")


def test_dpo(tmp_path):
    more = "--beta 0.2 --gamma 0 --dpo_alpha=1.0 --gradient_accumulation_steps 16 --per_device_train_batch_size 1"
    made, text = recipe(tmp_path, words(more, script="llava/train/train_dpo.py"))
    assert (made.dpo.beta, made.dpo.sft_weight, made.batch_size) == (0.2, 0.0, 128)
    assert (made.data.batching, made.loss_average, made.data.too_long) == ("packed", "step", "drop")
    assert "NOT CARRIED OVER" not in text
    assert recipe(tmp_path, words(script="llava/train/train_dpo.py"))[0].dpo.sft_weight == 1.0  # the original's default
    assert (
        "--dpo_alpha 0.5: not supported"
        in recipe(tmp_path, words("--dpo_alpha 0.5", script="llava/train/train_dpo.py"))[1]
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--bits 4", "--bits 4: bitsandbytes' formats are not supported"),
        ("--brand_new 7", "--brand_new 7: not supported"),
        ("--brand_new", "--brand_new: not supported"),
        ("--mm_use_im_start_end True", "--mm_use_im_start_end True: not supported"),
        ("--fp16 True", "--fp16 True: set precision"),
        ("--force_sample True", "--force_sample True: not supported"),
        ("--frames_upbound 32", "a video shorter than frames_upbound seconds"),
        ("--version v0", "version v0: unknown template"),
        ("--optim adafactor", "optim adafactor: AdamW is used"),
        ("--lr_scheduler_type polynomial", "lr_scheduler_type polynomial: supported are"),
        ("--warmup_steps 50", "warmup_steps 50: write optimizer.warmup"),
        ("--image_folder a --video_folder b", "video_folder b: "),
        ("--mm_resampler_type qformer", "mm_resampler_type qformer: there is no such resampler"),
        ("--data_path $1", "data_path $1: a variable that the script does not set"),
        ("--deepspeed zero3_offload.json", "nothing is offloaded"),
    ],
)
def test_what_does_not_fit_is_a_comment(tmp_path, arguments, said):
    text = recipe(tmp_path, words(arguments))[1]
    assert any(said in line for line in text.splitlines() if line.startswith("#"))


def test_every_argument_is_in_the_recipe_or_in_its_comments(tmp_path):
    """Of a command with every argument that LLaVA and LLaVA-NeXT declare, each has been taken or is listed."""
    from llava_fast.train.recipes import from_args

    given = dict.fromkeys((*from_args._NO_MEANING, *from_args._OFF), "1") | {"unheard_of": "x"}
    more = " ".join(f"--{name} {value}" for name, value in given.items())
    text = recipe(tmp_path, words(more))[1]
    silent = [name for name in given if f"--{name} " not in text]
    assert silent == ["dpo_alpha", "video_fps"]  # 1 is what they are without being given


@pytest.mark.parametrize(
    ("launcher", "gpus"),
    [
        ("torchrun --nproc_per_node 8 --nnodes 2", 16),
        ("torchrun --nproc-per-node=4", 4),
        ("deepspeed --num_gpus=2", 2),
        ("deepspeed --include localhost:0,1,5", 3),
        ("deepspeed --include a:0,1@b:0,1", 4),
        ("accelerate launch --num_processes 8", 8),
        ("CUDA_VISIBLE_DEVICES=0,1 deepspeed", 2),
    ],
)
def test_the_number_of_gpus_is_read(tmp_path, launcher, gpus):
    made, _ = recipe(tmp_path, words("--per_device_train_batch_size 1", launcher))
    assert made.batch_size == gpus
    assert recipe(tmp_path, words("--per_device_train_batch_size 1", launcher), gpus=5)[0].batch_size == 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (words(launcher="deepspeed"), "--gpus 8"),
        (words(launcher="torchrun --nproc_per_node=$NUM"), "--gpus 8"),
        (["torchrun", "serve.py"], "not a LLaVA training command"),
        (["missing.sh"], "missing.sh cannot be read as a script"),
        (words("--learning_rate fast"), "--learning_rate 'fast': must be a number"),
        (words("--bf16 perhaps"), "--bf16 perhaps: must be True or False"),
        (["torchrun", "--nproc_per_node=1", "train.py", "--data_path", "d"], "no --output_dir"),
    ],
)
def test_what_cannot_be_a_recipe(given, said):
    with pytest.raises(RecipeError, match=said):
        recipe_from_args(given)


def test_the_command_line_prints_and_writes(tmp_path):
    run = CliRunner()
    printed = run.invoke(recipe_cli.app, ["from-args", "--gpus", "4", "--", *words()])
    assert printed.exit_code == 0
    assert yaml.safe_load(printed.stdout)["batch_size"] == 32
    (tmp_path / "run.sh").write_text("python -m llava.train.train_mem " + LEAST)
    done = run.invoke(
        recipe_cli.app, ["from-args", "--gpus", "2", "--write", str(tmp_path / "r.yaml"), str(tmp_path / "run.sh")]
    )
    assert done.exit_code == 0
    assert load_recipe(tmp_path / "r.yaml").batch_size == 16
    quoted = run.invoke(recipe_cli.app, ["from-args", " ".join(words())])
    assert yaml.safe_load(quoted.stdout)["batch_size"] == 64
