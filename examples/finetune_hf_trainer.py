"""Fine-tune an accelerated LLaVA with transformers' Trainer. By default, the demo model learns a new question.

python examples/finetune_hf_trainer.py OUT_DIR                    # add --no-accelerate to compare
python examples/finetune_hf_trainer.py OUT_DIR --lora

Needs `pip install 'llava_fast[train,demo]'`. The lines that are specific to llava_fast are marked (1) to (3).
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import AutoModelForImageTextToText, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import llava_fast
from llava_fast.demo import compose, split_scans
from llava_fast.demo.run import model_path
from llava_fast.integrations.collator import Collator
from llava_fast.integrations.processor import FastProcessor

QUESTION = "Which is the smallest digit?"


class Canvases(torch.utils.data.Dataset):
    """Canvases of digits with the question and its answer. Each canvas is determined by its index."""

    def __init__(self, count: int) -> None:
        self.count, self.scans = count, split_scans()[0]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        canvas = compose(np.random.default_rng(index), self.scans, count=index % 5 + 1)
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": str(min(canvas.digits))},
        ]
        return {"messages": messages, "images": [canvas.image]}


class Report(TrainerCallback):
    """Prints the loss and the duration of each step."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.milliseconds.append(1000 * (time.perf_counter() - self.start))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            print(f"step {state.global_step}: loss {float(logs['loss']):.4f}, {self.milliseconds[-1]:.0f} ms")


def main(
    output: Annotated[Path, typer.Argument(help="Directory of the fine-tuned model.")],
    model: Annotated[Path | None, typer.Option(help="A LLaVA or LLaVA-NeXT checkpoint. Default: the demo.")] = None,
    accelerate: Annotated[bool, typer.Option(help="Accelerate the model, or leave it stock.")] = True,
    lora: Annotated[bool, typer.Option(help="Train LoRA adapters on the decoder and merge them at the end.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Canvases a step.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the order of canvases and of the adapters.")] = 0,
) -> None:
    """Fine-tune the model, print losses and step times, and save it."""
    torch.manual_seed(seed)
    path = model or model_path()
    processor = FastProcessor.from_pretrained(str(path))  # (1) transformers' processor, faster
    hf_model = AutoModelForImageTextToText.from_pretrained(path)
    if accelerate:
        llava_fast.accelerate(hf_model, processor)  # (2) in place; before or after LoRA
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        hf_model = get_peft_model(hf_model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    report = Report()
    trainer = Trainer(
        hf_model,
        TrainingArguments(
            str(output),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3 if lora else 2e-4,
            warmup_steps=steps // 10,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,  # the collator needs messages and images, which are no arguments of forward
            seed=seed,
        ),
        train_dataset=Canvases(steps * batch_size),
        # (3) labels from one tokenisation; with the plan, an accelerated model needs no device synchronisation
        data_collator=Collator(processor, hf_model, plan=accelerate),
        callbacks=[report],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    times = report.milliseconds[min(3, steps - 1) :]  # the first steps warm up
    print(f"median step: {statistics.median(times):.0f} ms, {'accelerated' if accelerate else 'stock'}")
    merged = trainer.model.merge_and_unload() if lora else trainer.model
    merged.save_pretrained(output)
    processor.save_pretrained(output)
    print(f"saved as {output}: transformers and llava_fast.load read it")


if __name__ == "__main__":
    typer.run(main)
