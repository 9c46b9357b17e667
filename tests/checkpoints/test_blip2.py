"""BLIP-2: prompts as transformers' processor makes them, the image before the BOS token, and errors for models that are
not supported. Logits, answers, gradients, saving and training are those of every family (see CASES and GUESTS)."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

import llava_fast
from llava_fast.errors import CheckpointError
from llava_fast.families import family_of_config, read_config
from llava_fast.inputs.chat.rendering import builtin_template
from llava_fast.inputs.plan.columns import TEXT
from llava_fast.inputs.tiling.coverage import image_coverage
from llava_fast.models.connectors.qformer import QFormerConfig
from llava_fast.models.vlm import LlavaModel
from tests.support import tiny

OPT_2_7B = {
    "model_type": "blip-2",
    "image_token_index": 50265,
    "num_query_tokens": 32,
    "qformer_config": {"classifier_dropout": None, "model_type": "blip_2_qformer"},
    "text_config": {
        "model_type": "opt",
        "eos_token_id": 50118,
        "ffn_dim": 10240,
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 50304,
        "word_embed_proj_dim": 2560,
    },
    "vision_config": {"dropout": 0.0, "model_type": "blip_2_vision_model", "num_channels": 3, "projection_dim": 512},
}
VICUNA_7B = OPT_2_7B | {
    "model_type": "instructblip",
    "image_token_index": 32000,
    "qformer_config": {"model_type": "instructblip_qformer", "vocab_size": 30523},
    "text_config": {"model_type": "llama", "max_position_embeddings": 2048, "vocab_size": 32001},
    "vision_config": {"model_type": "instructblip_vision_model", "num_channels": 3},
}
FLAN_T5_XL = OPT_2_7B | {
    "image_token_index": 32100,
    "text_config": {
        "model_type": "t5",
        "d_ff": 5120,
        "d_model": 2048,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu",
        "feed_forward_proj": "gated-gelu",
        "n_positions": 512,
        "num_decoder_layers": 24,
        "num_heads": 32,
        "num_layers": 24,
        "tie_word_embeddings": False,
    },
}
PICTURE = tiny.picture(60, 90)


def ids_of(requests: list[dict], name: str = "blip2", **options) -> list[list[int]]:
    """The token of each row, IMAGE_ID for an image's."""
    model = tiny.pair(name).ours
    plan = model.own_processor.prepare(requests, **options).plan
    ids = np.where(plan.column("source") == TEXT, plan.column("row"), tiny.IMAGE_ID)
    return [each.tolist() for each in np.split(ids, plan.column("boundaries")[1:-1])]


@pytest.mark.parametrize("published", [OPT_2_7B, FLAN_T5_XL, VICUNA_7B], ids=["opt", "t5", "vicuna"])
def test_a_sparse_config_of_published_size_has_transformers_tensors(published, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published))
    config, _ = read_config(tmp_path)
    stock = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model, expected = LlavaModel(config), AutoModelForImageTextToText.from_config(stock).state_dict()
    names = family_of_config(config).names
    found = {names.to_stored(name, "hf", config): value.shape for name, value in model.named_parameters()}
    if config.decoder.tie_embeddings:
        del expected["language_model.lm_head.weight"]
    expected = {name: value for name, value in expected.items() if not names.is_skipped(name)}
    assert found == {name: value.shape for name, value in expected.items()}
    assert (config.projected_per_tile, config.vision.rows_per_tile, config.vision.layers_needed) == (32, 257, 39)


@pytest.mark.parametrize("name", ["blip2", "blip2_t5"])
@pytest.mark.parametrize("text", ["Question: the hello? Answer:", "a photo of", ""])
def test_prompts_are_those_of_transformers_processor(text, name):
    processor = tiny.pair(name).processor
    processor.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    expected = processor(images=Image.fromarray(PICTURE), text=text)["input_ids"][0]
    start = [] if name == "blip2" else [tiny.PAD_ID]  # with which a T5's answer begins
    assert ids_of([{"prompt": f"<image>{text}", "images": [PICTURE]}], name) == [[*expected, *start]]


def test_a_question_about_an_image_and_its_label():
    user = {"role": "user", "content": [{"type": "text", "text": "the hello?"}, {"type": "image", "image": PICTURE}]}
    asked = {"prompt": "<image>Question: the hello? Answer:", "images": [PICTURE]}
    assert ids_of([{"messages": [user]}]) == ids_of([asked])
    answered = [user, {"role": "assistant", "content": "a"}]
    plan = tiny.pair("blip2").ours.own_processor.prepare([{"messages": answered}], labels=True).plan
    assert tiny.tokenizer().decode(plan.column("supervised_target").tolist()) == " a\n"


def test_images_elsewhere_stay_there():
    image, bos = [tiny.IMAGE_ID] * tiny.QUERIES, [1]
    (hello,) = tiny.tokenizer()("hello", add_special_tokens=False)["input_ids"]
    request = {"prompt": "<image><image>hello<image>", "images": [PICTURE] * 3}
    assert ids_of([request, {"prompt": "hello"}]) == [image + image + bos + [hello, *image], [*bos, hello]]


def test_a_video_is_its_frames():
    frames = {"prompt": "<image><image>hello", "images": [PICTURE, PICTURE[:, ::-1].copy()]}
    video = {"prompt": "<video>hello", "video": np.stack(frames["images"])}
    model = tiny.pair("blip2").ours
    with torch.no_grad():
        both = [model(model.prepare([request])).logits for request in (frames, video)]
    torch.testing.assert_close(*both)


def test_its_template_and_the_place_of_its_rows():
    model = tiny.pair("blip2").ours
    assert model.own_processor.template == builtin_template("blip2")
    coverage = image_coverage(model.config.geometry, 60, 90)
    assert [[region.tokens for region in view] for view in coverage.regions] == [[tiny.QUERIES]]
    assert coverage.regions[0][0].box == (0, 0, 90, 60)
    assert llava_fast.count_tokens(model, 60, 90) == tiny.QUERIES


def test_the_first_self_attention_of_all_tiles_is_one():
    """The queries do not differ before they have seen a tile."""
    connector = copy.deepcopy(tiny.pair("blip2").ours.projector)
    seen = []
    first = connector.encoder["layer"][0]
    first.attention.register_forward_hook(lambda module, given, made: seen.append(made.shape[0]))
    rows = torch.randn(4, connector.config.rows, connector.config.in_features)
    with torch.no_grad():
        together, alone = connector(rows), connector(rows[2:3])
    assert seen == [1, 1]
    torch.testing.assert_close(together[2:3], alone)
    assert connector(rows[:0]).shape == (0, tiny.QUERIES, 64)


def test_a_connector_that_does_not_fit_says_so():
    with pytest.raises(ValueError, match="hidden_size 48 has no 5 equal heads"):
        QFormerConfig(8, 8, 4, 2, 48, 96, 2, 5)
    with pytest.raises(ValueError, match="reads 4 rows per tile, and the tower gives 5"):
        QFormerConfig(8, 8, 4, 2, 48, 96, 2, 4).rows_of(5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_config": {"model_type": "falcon"}}, "text_config.model_type is 'falcon'; supported are"),
        ({"qformer_config": {"use_qformer_text_input": True}}, "retrieval is not supported"),
        ({"qformer_config": {"num_attention_heads": 5}}, "hidden_size 48 is no multiple of 5 num_attention_heads"),
        ({"qformer_config": {"hidden_act": "tanh"}}, "qformer_config.hidden_act is 'tanh'; supported are"),
        ({"image_token_index": None}, "image_token_id is null"),
        ({"num_query_tokens": 6}, "num_query_tokens is 5, but config.json implies 6"),
    ],
)
def test_an_unsupported_checkpoint_says_so(change, said, tmp_path):
    pair = tiny.pair("blip2")
    pair.hf.config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    source = json.loads(file.read_text())
    for name, value in change.items():
        source[name] = source[name] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(source))
    (tmp_path / "processor_config.json").write_text('{"num_query_tokens": 5}')
    with pytest.raises(CheckpointError, match=said):
        read_config(tmp_path)
