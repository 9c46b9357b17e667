"""A LLaVA assembled from a language model and a tower: its parts, saving it, and errors."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import llava_fast
from llava_fast.checkpoints.assemble import Assembly, Rope, assemble
from llava_fast.errors import CheckpointError
from tests.support import tiny

FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
PINPOINTS = [(56, 112), (112, 56), (112, 112)]
REQUEST = {
    "messages": [{"role": "user", "content": "<image>\nhello"}],
    "images": [tiny.picture(50, 90)],
}


def language_model(folder, family="llama", **changes):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = FAMILIES[family](**({**tiny.TEXT, **heads, "vocab_size": tiny.VOCABULARY} | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    words = copy.deepcopy(tiny.tokenizer())
    words.chat_template = "{{ messages }}"  # of a language model: it knows no images
    words.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A decoder's and a tower's directory."""
    folder = tmp_path_factory.mktemp("parts")
    language_model(folder / "decoder")
    tower = CLIPVisionModel(CLIPVisionConfig(**tiny.TOWER, image_size=56, patch_size=8))
    tower.save_pretrained(folder / "tower")
    square = {"height": 56, "width": 56}
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square).save_pretrained(folder / "tower")
    return {"decoder": str(folder / "decoder"), "vision_tower": str(folder / "tower")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_the_language_model(parts, tmp_path, family):
    reference = language_model(tmp_path, family)
    model = llava_fast.load(Assembly(**parts | {"decoder": str(tmp_path)}))
    ids = torch.arange(10, 60)[None]
    text = model.tokenizer.decode(ids[0])
    batch = model.prepare([{"prompt": text}])
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(batch, logits="all").logits, reference(ids).logits[0], rtol=1e-5, atol=1e-5)


def test_the_tower_is_the_one_named_and_the_projector_begins_as_linears_do(parts):
    model = llava_fast.load(Assembly(**parts))
    tower = CLIPVisionModel.from_pretrained(parts["vision_tower"])
    wanted = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    found = dict(model.vision_tower.named_parameters())
    assert found
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    torch.manual_seed(0)
    linears = [torch.nn.Linear(32, 64), torch.nn.Linear(64, 64)]
    for place, linear in zip((0, 2), linears, strict=True):
        assert torch.equal(model.projector.layers[place].weight, linear.weight)
        assert torch.equal(model.projector.layers[place].bias, linear.bias)
    assert not torch.equal(llava_fast.load(Assembly(**parts, seed=1)).projector.layers[0].weight, linears[0].weight)
    assert not model.config.has_newline


def test_building_draws_nothing_from_the_global_generator(parts):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    assemble(Assembly(**parts))
    assert torch.equal(torch.rand(3), wanted)


def test_anyres_has_a_newline_and_reads_pinpoints_as_the_original(parts):
    model = llava_fast.load(Assembly(**parts, aspect="anyres", pinpoints=PINPOINTS, merge="spatial_unpad"))
    assert model.config.geometry.canvases == ((112, 56), (56, 112), (112, 112))  # (height, width)
    assert model.image_newline.std().item() == pytest.approx(64**-0.5, rel=0.5)


@pytest.mark.parametrize("anyres", [False, True])
def test_saved_for_transformers_it_has_an_image_token(parts, tmp_path, anyres):
    tiled = {"aspect": "anyres", "pinpoints": PINPOINTS, "merge": "spatial_unpad"} if anyres else {}
    decoder = tmp_path / "decoder"
    language_model(decoder, vocab_size=len(tiny.tokenizer()))  # no row to spare for the image token
    text = (decoder / "tokenizer.json").read_text().replace("<image>", "<other>")
    (decoder / "tokenizer.json").write_text(text)
    config = (decoder / "tokenizer_config.json").read_text().replace("<image>", "<other>")
    (decoder / "tokenizer_config.json").write_text(config)
    model = llava_fast.load(Assembly(**parts | {"decoder": str(decoder)}, **tiled), chat_template="vicuna_v1")
    llava_fast.save(model, tmp_path / "hf", layout="hf")
    kind = LlavaNextForConditionalGeneration if anyres else LlavaForConditionalGeneration
    stock = kind.from_pretrained(tmp_path / "hf")
    rows = stock.get_input_embeddings().weight
    assert stock.config.image_token_id == len(model.tokenizer)
    assert len(rows) == 320  # 277 tokens, and up to a multiple of 64
    again = llava_fast.load(tmp_path / "hf", chat_template="vicuna_v1")
    assert (
        again.generate([REQUEST], max_new_tokens=8)[0].token_ids
        == model.generate([REQUEST], max_new_tokens=8)[0].token_ids
    )
    llava_fast.save(model, tmp_path / "original", layout="original")
    same = llava_fast.load(tmp_path / "original", chat_template="vicuna_v1")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("form", ["file", "directory", "original", "hf"])
def test_a_trained_projector_is_taken_from(parts, tmp_path, form):
    tiled = {"aspect": "anyres", "pinpoints": PINPOINTS, "merge": "spatial_unpad"}
    trained = llava_fast.load(Assembly(**parts, seed=3, **tiled))
    if form in ("original", "hf"):
        llava_fast.save(trained, tmp_path / "whole", layout=form)
        where = tmp_path / "whole"
    else:  # what the original trainer writes after its first stage
        names = {
            f"model.mm_projector.{name.removeprefix('layers.')}": p.data
            for name, p in trained.projector.named_parameters()
        }
        torch.save(names, tmp_path / "mm_projector.bin")
        where = tmp_path / "mm_projector.bin" if form == "file" else tmp_path
    model = llava_fast.load(Assembly(**parts, projector_from=str(where), **tiled))
    assert all(
        torch.equal(a, b) for a, b in zip(trained.projector.parameters(), model.projector.parameters(), strict=True)
    )
    assert torch.equal(trained.image_newline, model.image_newline) == (form in ("original", "hf"))


def test_a_stretched_context(parts):
    config = assemble(Assembly(**parts, rope=Rope(factor=2.0))).config
    assert (config.decoder.rope.kind, config.decoder.context_length) == ("linear", 8192)


def test_siglip_and_video_pooling(parts, tmp_path):
    tower = SiglipVisionModel(SiglipVisionConfig(vision_use_head=False, **tiny.TOWER, image_size=56, patch_size=8))
    tower.save_pretrained(tmp_path)
    made = assemble(Assembly(**parts | {"vision_tower": str(tmp_path)}, aspect="square", video_pool_stride=2))
    assert made.config.vision.num_layers == 2  # the original deletes the last
    assert (made.config.geometry.video_pool, made.config.geometry.video_pool_stage) == ("average", "after")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": "mlp3x_gelu"}, "projector_from.*the recipe's is ProjectorConfig.kind='mlp'"),
        ({"projector": "conv"}, "mm_projector_type is 'conv'"),
        ({"projector_from": "{decoder}"}, "holds no projector"),
        ({"aspect": "round"}, "image_aspect_ratio is 'round'"),
    ],
)
def test_what_does_not_fit_is_named(parts, tmp_path, changes, message):
    torch.save({"model.mm_projector.weight": torch.zeros(64, 32)}, tmp_path / "mm_projector.bin")
    given = {"projector_from": str(tmp_path)} | {key: value.format(**parts) for key, value in changes.items()}
    with pytest.raises(CheckpointError, match=message):
        assemble(Assembly(**parts, **given))


def test_a_decoder_that_is_a_llava_or_no_llama(parts, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_next"}))
    with pytest.raises(CheckpointError, match=f"is a LLaVA already: write `model: {tmp_path}`"):
        assemble(Assembly(**parts | {"decoder": str(tmp_path)}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="model_type of the decoder is 'gpt2'; supported are llama"):
        assemble(Assembly(**parts | {"decoder": str(tmp_path)}))
    with pytest.raises(CheckpointError, match="vision_tower cannot be used with a recipe"):
        llava_fast.load(Assembly(**parts), vision_tower="elsewhere")
