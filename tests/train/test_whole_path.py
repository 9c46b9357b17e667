"""The whole path, on the demo: two stages, sharding and adapters, SIGKILL, resume, merge, export, transformers and
accelerate. Whoever answers, and from whichever of the run's files, the answers are the same."""

import copy
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlamaForCausalLM,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)
from typer.testing import CliRunner

import llava_fast
from llava_fast.cli.main import app
from llava_fast.demo import compose, questions, split_scans
from llava_fast.demo.run import model_path
from llava_fast.train.metrics import FILE, read_metrics
from llava_fast.train.parallel import World
from llava_fast.train.run import build_trainer, load_model, train

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("path")


@pytest.fixture(scope="module")
def parts(folder) -> dict:
    """The demo model's decoder and tower, as a language model and a tower of their own."""
    demo = LlavaNextForConditionalGeneration.from_pretrained(model_path())
    decoder = LlamaForCausalLM(demo.config.text_config)
    decoder.model.load_state_dict(demo.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(demo.lm_head.state_dict())
    decoder.save_pretrained(folder / "decoder")
    processor = LlavaNextProcessor.from_pretrained(model_path(), use_fast=False)
    processor.tokenizer.save_pretrained(folder / "decoder")
    demo.model.vision_tower.save_pretrained(folder / "tower")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder / "tower"
    )
    return {"decoder": str(folder / "decoder"), "vision_tower": str(folder / "tower")}


@pytest.fixture(scope="module")
def sources(folder) -> dict[str, list]:
    """Canvases of digits: "captions" has one each, "mixed" has one, two or none, and one question or two."""
    rng = np.random.default_rng(0)
    scans = split_scans()[0]
    captions, mixed = [], []
    for number in range(24):
        canvas = compose(rng, scans, count=1 + number % 3, long_side=(60, 120))
        Image.fromarray(canvas.image).save(folder / f"{number}.png")
        digits = questions.answer("read", canvas.digits)
        marked = {"from": "human", "value": "Read the digits.\n<image>"}
        captions.append({"image": f"{number}.png", "conversations": [marked, {"from": "gpt", "value": digits}]})
        images = [[f"{number}.png"], [], [f"{number - 2}.png", f"{number}.png"]][number % 3]
        turns = []
        for kind in ("count", "read")[: 1 + number % 2]:
            answer = questions.answer(kind, canvas.digits) if images else "none"
            placeholder = "<image>\n" * len(images) if not turns else ""
            turns += [
                {"from": "human", "value": placeholder + questions.ask(rng, kind)},
                {"from": "gpt", "value": answer},
            ]
        mixed.append({"image": images, "conversations": turns})
    for name, samples in (("captions", captions), ("mixed", mixed)):
        (folder / f"{name}.json").write_text(json.dumps(samples))
    return {name: [{"path": str(folder / f"{name}.json")}] for name in ("captions", "mixed")}


@pytest.fixture(scope="module")
def requests(folder) -> list[dict]:
    """Prompts in the template of the training, with one canvas, two, and none."""
    rng = np.random.default_rng(1)
    made = []
    for images in (1, 1, 2, 0, 1):
        paths = []
        for place in range(images):
            paths.append(folder / f"held-out-{len(made)}-{place}.png")
            canvas = compose(rng, split_scans()[1], count=4, long_side=(60, 120))
            Image.fromarray(canvas.image).save(paths[-1])
        made.append(
            {"prompt": "[INST] " + "<image>\n" * images + "Read the digits. [/INST]", "images": list(map(str, paths))}
        )
    return made


def answers(model, requests) -> list[str]:
    return [answer.text.strip() for answer in model.eval().generate(requests, max_new_tokens=10)]


def stock_answers(model, path, requests) -> list[str]:
    processor = LlavaNextProcessor.from_pretrained(path)
    processor.image_processor = LlavaNextImageProcessorPil.from_pretrained(path)
    found = []
    for request in requests:
        images = [Image.open(image) for image in request["images"]] or None
        inputs = processor(text=request["prompt"], images=images, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found.append(processor.decode(tokens, skip_special_tokens=True).strip())
    return found


def test_the_same_answers_throughout(recipe_in, run, parts, sources, requests, folder):
    pytest.importorskip("peft")
    tiles = {"aspect": "anyres", "pinpoints": [[32, 64], [64, 32], [64, 64]], "merge": "spatial_unpad"}
    one = recipe_in(
        folder / "one",
        model=parts | tiles,
        trainable=["projector"],
        data={"sources": sources["captions"], "template": "plain"},
        optimizer={"learning_rate": 1e-2},
        epochs=2,
        micro_batch_rows=2000,
        recompute="none",
    )
    train(one)

    two = recipe_in(
        folder / "two",
        model=parts | tiles | {"projector_from": str(folder / "one" / "projector")},
        lora={"rank": 8, "alpha": 16},
        trainable=["projector"],
        data={"sources": sources["mixed"], "template": "mistral"},
        optimizer={"learning_rate": 3e-3},
        epochs=2,
        micro_batch_rows=400,
        recompute="none",
        parallel={"kind": "fsdp2"},
        checkpoints={"every": 2},
    )
    assert -signal.SIGKILL in run(two, processes=2, kill="step:4")
    run(two, processes=2)
    steps = read_metrics(two.output / FILE)
    assert [values["step"] for values in steps] == list(range(1, 7))
    assert steps[-1]["loss"] < steps[0]["loss"]

    trainer = build_trainer(two, load_model(two, ALONE), ALONE)
    assert trainer.resume() == 6
    wanted = answers(trainer.bare, requests)  # by the adapters, as it was trained
    assert len(set(wanted)) > 2

    exported, adapter, merged = two.output / "model", two.output / "adapter", folder / "merged"
    command = ["merge-lora", str(adapter), str(merged), "--model-base", parts["decoder"], "--layout", "hf"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    original = folder / "original"
    llava_fast.save(llava_fast.load(exported), original, layout="original")
    found = {
        "exported": answers(llava_fast.load(exported), requests),
        "adapter over its base": answers(llava_fast.load(adapter, model_base=parts["decoder"]), requests),
        "merge-lora": answers(llava_fast.load(merged), requests),
        "in the original's layout": answers(llava_fast.load(original), requests),
    }
    for name, path in (("transformers", exported), ("merge-lora in transformers", merged)):
        stock = LlavaNextForConditionalGeneration.from_pretrained(path).eval()
        found[name] = stock_answers(stock, path, requests)
        found[f"{name}, accelerated"] = stock_answers(llava_fast.accelerate(copy.deepcopy(stock)), path, requests)
    assert found == dict.fromkeys(found, wanted)
