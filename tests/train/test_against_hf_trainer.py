"""Twenty steps beside transformers' own Trainer: the same tiny model, samples, AdamW and schedule in float32."""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import SequentialSampler
from transformers import LlavaNextForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

import llava_fast
from llava_fast.train.data.samples import read_sources
from llava_fast.train.metrics import FILE, read_metrics
from llava_fast.train.parallel import World
from llava_fast.train.run import build_loader, load_model, train
from tests.support.tiny import CASES, PAD_ID, Pair, hf_processor

STEPS, BATCH, RATE = 20, 4, 2e-5


class Samples(torch.utils.data.Dataset):
    """What transformers' model takes, sample by sample in our order."""

    def __init__(self, recipe) -> None:
        model = load_model(recipe, World(0, 1, torch.device("cpu")))
        schedule = build_loader(recipe, model, World(0, 1, torch.device("cpu"))).schedule
        numbers = np.concatenate([schedule.samples(step) for step in range(STEPS)])
        table = read_sources(recipe.data.sources)
        pair = Pair(CASES["next"], None, hf_processor(CASES["next"]), llava_fast.load(recipe.model))
        self.items = [self.features(pair, model.processor, table[int(number)].request) for number in numbers]

    @staticmethod
    def features(pair: Pair, processor, request: dict) -> dict:
        prompt = "".join(segment.text for segment in processor.render(request, True)[0])
        images = [np.asarray(Image.open(path).convert("RGB")) for path in request.get("images", [])]
        inputs = pair.reference_inputs(prompt, images)
        label = processor.prepare([request], labels=True).plan.column("label")
        assert inputs["input_ids"].shape[1] == len(label)
        return {**inputs, "labels": torch.from_numpy(label.copy()).long()[None]}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict:
        return self.items[number]


def collate(samples: list[dict]) -> dict:
    width = max(sample["input_ids"].shape[1] for sample in samples)
    fill = {"input_ids": PAD_ID, "attention_mask": 0, "labels": -100}
    batch = {
        name: torch.cat([torch.nn.functional.pad(s[name], (0, width - s[name].shape[1]), value=value) for s in samples])
        for name, value in fill.items()
    }
    pictures = [sample for sample in samples if "pixel_values" in sample]
    if pictures:
        tiles = max(sample["pixel_values"].shape[1] for sample in pictures)
        padded = [
            torch.nn.functional.pad(s["pixel_values"], (0,) * 7 + (tiles - s["pixel_values"].shape[1],))
            for s in pictures
        ]
        batch |= {"pixel_values": torch.cat(padded), "image_sizes": torch.cat([s["image_sizes"] for s in pictures])}
    return batch


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.found.append(logs["loss"])


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def stock_losses(recipe, output) -> list[float]:
    """transformers' losses, two samples at once and two such batches a step."""
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration.from_pretrained(recipe.model, dtype=torch.float32)
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    losses = Losses()
    arguments = TrainingArguments(
        str(output),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=BATCH // 2,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.0,
        adam_beta2=0.999,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    InOrder(model, arguments, collate, Samples(recipe), callbacks=[losses]).train()
    return losses.found


def test_the_same_losses_for_twenty_steps(make_recipe, tiny_data, tmp_path):
    source = {"path": str(tiny_data), "images": str(tiny_data.parent), "sampling": "first:20"}  # whole steps alone
    shared = {
        "steps": STEPS,
        "epochs": 10,
        "batch_size": BATCH,
        "optimizer": {"learning_rate": RATE, "warmup": 0.1},
    }
    padded = make_recipe(**shared, micro_batch=2, data={"batching": "padded", "sources": [source]})
    packed = make_recipe(**shared, data={"sources": [source]}, output=str(tmp_path / "packed"))
    for recipe in (padded, packed):
        train(recipe)
    theirs = stock_losses(padded, tmp_path / "stock")
    assert len(theirs) == STEPS
    for recipe in (padded, packed):
        np.testing.assert_allclose([v["loss"] for v in read_metrics(recipe.output / FILE)], theirs, rtol=1e-5)
