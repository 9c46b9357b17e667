"""A language model and a tower become a LLaVA: stage 1, stage 2 on its projector, and what transformers reads."""

import json

import pytest
import tiny
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
from llava_fast.train.trainer import train


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
    """As LLaVA's first stage has them: a request that is only the picture's mark to the model, and a caption."""
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
