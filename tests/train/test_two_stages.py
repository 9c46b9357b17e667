"""A language model and a tower become a LLaVA: stage 1, stage 2 on its projector, and what transformers reads."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextForConditionalGeneration,
)

import llava_fast
from llava_fast.train.metrics import FILE, read_metrics
from llava_fast.train.parallel import World
from llava_fast.train.run import build_loader, load_model, train
from tests.support import tiny

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def parts(tmp_path):
    heads = {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=tiny.VOCABULARY, **tiny.TEXT, **heads)).save_pretrained(
        tmp_path / "decoder"
    )
    tiny.tokenizer().save_pretrained(tmp_path / "decoder")
    CLIPVisionModel(CLIPVisionConfig(**tiny.TOWER, image_size=56, patch_size=8)).save_pretrained(tmp_path / "tower")
    square = {"height": 56, "width": 56}
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square).save_pretrained(tmp_path / "tower")
    return {"decoder": str(tmp_path / "decoder"), "vision_tower": str(tmp_path / "tower")}


def captions(folder, samples=12):
    """As LLaVA's first stage has them: a request that is only the picture's placeholder to the model, and a caption."""
    records = []
    for number in range(samples):
        Image.fromarray(tiny.picture(40 + number, 70, seed=number)).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "Describe.\n<image>"},
            {"from": "gpt", "value": "a box " * (number % 3 + 1)},
        ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "captions.json").write_text(json.dumps(records))
    return [{"path": str(folder / "captions.json")}]


def test_both_stages(make_recipe, parts, tmp_path):
    sources = captions(tmp_path)
    first = make_recipe(
        model=parts | {"aspect": "square"},
        trainable=["projector"],
        data={"sources": sources, "template": "plain", "label_mask": "original"},
        output=str(tmp_path / "one"),
    )
    one = llava_fast.load(train(first))
    begun = llava_fast.load(first.model)
    assert torch.equal(one.decoder.layers[0].mlp.up_proj.weight, begun.decoder.layers[0].mlp.up_proj.weight)
    assert not torch.equal(one.projector.layers[0].weight, begun.projector.layers[0].weight)

    alone = tmp_path / "one" / "projector"
    stored = torch.load(alone / "mm_projector.bin", weights_only=True)
    assert {name.rpartition(".")[0] for name in stored} == {"model.mm_projector.0", "model.mm_projector.2"}
    read = llava_fast.load(alone, model_base=parts["decoder"])
    assert torch.equal(read.projector.layers[2].weight, one.projector.layers[2].weight)

    tiled = {"aspect": "anyres", "pinpoints": [[56, 112], [112, 56], [112, 112]], "merge": "spatial_unpad"}
    second = make_recipe(
        model=parts | tiled | {"projector_from": str(alone)},
        data={"sources": sources},
        output=str(tmp_path / "two"),
    )
    taken = llava_fast.load(second.model)
    assert torch.equal(taken.projector.layers[0].weight, one.projector.layers[0].weight)
    path = train(second)
    two = llava_fast.load(path, chat_template="vicuna_v1")
    assert not torch.equal(two.decoder.layers[0].mlp.up_proj.weight, one.decoder.layers[0].mlp.up_proj.weight)
    assert not torch.equal(two.image_newline, taken.image_newline)

    stock = LlavaNextForConditionalGeneration.from_pretrained(path).eval()
    batch = two.prepare([{"prompt": "USER: <image>\nhello ASSISTANT:", "images": [str(tmp_path / "3.png")]}])
    embeds = two.inputs_embeds(batch)
    with torch.no_grad():
        ours = two(batch, logits="all").logits
        theirs = stock.model.language_model(inputs_embeds=embeds[None]).last_hidden_state[0]
        torch.testing.assert_close(ours, stock.lm_head(theirs), rtol=1e-4, atol=1e-4)


def films(folder, samples=8):
    """Questions about videos, a file and a folder of frames in turn."""
    av = pytest.importorskip("av")
    with av.open(str(folder / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(tiny.picture(48, 64, number), format="rgb24")))
        container.mux(stream.encode())
    (folder / "frames").mkdir()
    for number in range(5):
        Image.fromarray(tiny.picture(50, 70, number)).save(folder / "frames" / f"{number}.png")
    records = []
    for number in range(samples):
        turns = [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": ["a box", "the cup"][number % 2]},
        ]
        records.append({"id": str(number), "video": ["film.mp4", "frames"][number % 2], "conversations": turns})
    (folder / "films.json").write_text(json.dumps(records))
    return [{"path": str(folder / "films.json")}]


def test_a_training_on_videos(make_recipe, parts, tmp_path):
    """What LLaVA-Video's command line asks for: pooled frames, a newline a row, longer positions, the frames' times."""
    shape = {"video_pool": "average", "video_pool_stride": 2, "video_newline": "grid", "merge": "spatial_unpad"}
    rope = {"kind": "linear", "factor": 2.0}
    data = {"sources": films(tmp_path), "template": "qwen", "video_frames": 4, "time_instruction": True}
    settings = {"batch_size": 4, "epochs": 4, "layout": "original", "optimizer": {"learning_rate": 5e-3}}
    recipe = make_recipe(model=parts | {"aspect": "square"} | shape | {"rope": rope}, data=data, **settings)
    begun = load_model(recipe, ALONE)
    loader = build_loader(recipe, begun, ALONE)
    assert loader.lengths.visual.tolist() == [4 * 3 * (3 + 1)] * 8  # 7x7 patches pooled, a newline after each row
    step = next(loader.steps(0))
    measured = loader.rows(loader.schedule.samples(0)).sum()
    assert sum(each.plan.rows for each in step.micro_batches) == measured
    silent = recipe.model_copy(update={"data": recipe.data.model_copy(update={"time_instruction": False})})
    assert (build_loader(silent, load_model(silent, ALONE), ALONE).lengths.text + 100 < loader.lengths.text).all()

    path = train(recipe)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / FILE)]
    assert len(losses) == 8
    assert losses[-1] < 0.75 * losses[0]
    config = json.loads((path / "config.json").read_text())
    assert (config["mm_spatial_pool_mode"], config["mm_spatial_pool_stride"]) == ("average", 2)
    assert config["mm_newline_position"] == "grid"
    assert config["rope_scaling"]["factor"] == 2.0
    made = llava_fast.load(path)
    assert made.config.geometry == begun.config.geometry
    assert made.config.decoder == begun.config.decoder
    assert not torch.equal(made.image_newline, begun.image_newline)
