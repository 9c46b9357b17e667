"""InstructBLIP: what its Q-Former reads, against transformers' processor, and that an image's rows are reused only with
the same question. The rest is tested as for every family (see CASES and GUESTS)."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration

import llava_fast
from llava_fast.errors import CheckpointError, RequestError
from llava_fast.generation.feature_cache import FeatureCache
from llava_fast.generation.prompt import prompt_of
from llava_fast.generation.runner import Runner
from llava_fast.inputs.plan.buckets import bucket_of, fill
from llava_fast.inputs.plan.columns import TEXT
from llava_fast.models.batch import Batch
from tests.support import tiny
from tests.support.parity import assert_close
from tests.support.qformers import question_tokenizer
from tests.support.tiny_checkpoints import edit_json

PICTURE, OTHER = tiny.picture(60, 90), tiny.picture(50, 50)


def plan_of(*requests: dict):
    return tiny.pair("instructblip").ours.own_processor.prepare(list(requests)).plan


def questions(plan) -> list[str]:
    """The text that the connector reads with each tile."""
    return [question_tokenizer().decode(ids[ids >= 0], skip_special_tokens=True) for ids in plan.column("instruction")]


@pytest.mark.parametrize("text", ["what is the hello?", ""])
def test_prompts_are_those_of_transformers_processor(text):
    expected = tiny.pair("instructblip").processor(images=Image.fromarray(PICTURE), text=text)
    plan = plan_of({"prompt": f"<image>{text}", "images": [PICTURE]})
    ids = np.where(plan.column("source") == TEXT, plan.column("row"), tiny.IMAGE_ID)
    assert ids.tolist() == list(expected["input_ids"][0])
    assert plan.column("instruction").tolist() == [list(expected["qformer_input_ids"][0])]


def test_each_image_has_the_text_of_its_message():
    first = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "the first?"}]
    turns = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "<image> and <image>\nthe longer second?"},
    ]
    plan = plan_of({"messages": turns, "images": [OTHER, OTHER]}, {"messages": [turns[0]]}, {"prompt": "no image"})
    assert questions(plan) == ["the first?", "and \nthe longer second?", "and \nthe longer second?", "the first?"]
    assert "instruction" not in plan_of({"prompt": "no image"}).sections


def test_a_literal_placeholder_is_part_of_the_question():
    processor = tiny.pair("instructblip").ours.own_processor
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what is <image>?"}]
    found = processor.instructions.of(
        {"messages": [{"role": "user", "content": content}]}, re.compile("<image>"), literal=True
    )
    assert [question_tokenizer().decode(ids, skip_special_tokens=True) for ids in found] == ["what is <image>?"]


def test_a_frame_reads_the_question_as_an_image_does():
    model = tiny.pair("instructblip").ours
    frames = np.stack([PICTURE, PICTURE[:, ::-1]])
    both = {"prompt": "<image><image>hello", "images": list(frames)}, {"prompt": "<video>hello", "video": frames}
    with torch.no_grad():
        torch.testing.assert_close(*(model(model.prepare([request])).logits for request in both))


def test_a_video_is_what_transformers_video_model_makes_of_it():
    """It takes an InstructBLIP's weights, and four frames."""
    pair, text = tiny.pair("instructblip"), "what is the hello?"
    parts = {part: getattr(pair.hf.config, part).to_dict() for part in ("vision_config", "qformer_config")}
    for part in parts.values():
        del part["model_type"]
    parts["text_config"] = pair.hf.config.text_config.to_dict()
    config = InstructBlipVideoConfig(**parts, num_query_tokens=tiny.QUERIES, video_token_index=tiny.IMAGE_ID)
    stock = InstructBlipVideoForConditionalGeneration(config).eval()
    stock.load_state_dict(pair.hf.state_dict())
    video = np.stack([tiny.picture(60, 90, seed) for seed in range(4)])
    inputs = pair.reference_inputs("<image>" * 4 + text, list(video), question=text)
    inputs |= {"pixel_values": inputs["pixel_values"][None], "qformer_input_ids": inputs["qformer_input_ids"][:1]}
    inputs["qformer_attention_mask"] = inputs["qformer_attention_mask"][:1]
    with torch.no_grad():
        batch = pair.ours.prepare([{"prompt": f"<video>{text}", "video": video}])
        assert_close("logits, video", pair.ours(batch, logits="all").logits, stock(**inputs).logits[0])


def test_rows_are_reused_with_the_same_question_only():
    model = tiny.pair("instructblip").ours
    asked = [{"prompt": f"<image>{text}", "images": [PICTURE]} for text in ("hello?", "the hello?", "hello?")]
    images = [prompt_of(model.own_processor, request).parts[0] for request in asked]
    assert images[0].key == images[2].key != images[1].key
    cache = FeatureCache(1 << 20)
    runner = Runner(model, features=cache)
    with torch.no_grad():
        rows = [runner._found([[image]], cache)[0] for image in images]
    assert (cache.hits, cache.misses) == (1, 2)
    assert rows[0].equal(rows[2])
    assert not torch.allclose(rows[0], rows[1], rtol=1e-2)


def test_a_longer_neighbour_changes_nothing():
    """Padding of the shorter question is not attended to."""
    model = tiny.pair("instructblip").ours
    short = {"prompt": "<image>a?", "images": [PICTURE]}
    with torch.no_grad():
        alone = model(model.prepare([short])).logits
        together = model(model.prepare([short, {"prompt": "<image>the much longer?", "images": [OTHER]}])).logits
    torch.testing.assert_close(together[:1], alone)


def test_text_alone_runs_every_part_where_sharding_needs_it():
    model = tiny.pair("instructblip").ours
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a"}]
    model.zero_grad()
    try:
        model.runs_every_part = True
        model(model.prepare([{"messages": turns}], labels=True)).loss.backward()
        grads = {name: parameter.grad for name, parameter in model.projector.named_parameters()}
        assert [name for name, grad in grads.items() if grad is None or grad.any()] == []
    finally:
        model.runs_every_part = False
        model.zero_grad()


def test_what_it_does_not_support_says_so(tmp_path):
    pair = tiny.pair("instructblip")
    with pytest.raises(RequestError, match="has 702 tokens for the connector, which reads at most 512: shorten it"):
        plan_of({"prompt": "<image>" + "a" * 700, "images": [PICTURE]})
    told = replace(pair.ours.own_processor.instructions, vocabulary=3)
    with pytest.raises(RequestError, match=r"gives 'a' the id \d+, and the connector has embeddings for 3 tokens"):
        told.of({"prompt": "<image>a"}, re.compile("<image>"))
    plan = plan_of({"prompt": "<image>a", "images": [PICTURE]})
    with pytest.raises(ValueError, match="a plan with text for the connector cannot be padded to a bucket"):
        fill(plan, bucket_of(plan))
    bare = replace(pair.ours.own_processor, instructions=None).prepare([{"prompt": "<image>a", "images": [PICTURE]}])
    with pytest.raises(ValueError, match="Q-Former reads the question with each image, and none is given"):
        pair.ours(Batch.from_prepared(bare))
    tiny.save(pair.case, pair.hf, tmp_path)
    shutil.rmtree(tmp_path / "qformer_tokenizer")
    with pytest.raises(CheckpointError, match="qformer_tokenizer"):
        llava_fast.load(tmp_path)


def test_a_model_of_videos_takes_four_frames_of_a_file():
    processor = tiny.pair("instructblipvideo").ours.own_processor
    assert (processor.frames, replace(processor, video_frames=7).frames) == (4, 4)
    assert tiny.pair("instructblip").ours.own_processor.frames == 16
    frames = np.stack([tiny.picture(60, 90, seed) for seed in range(4)])
    plan = processor.prepare([{"prompt": "<video>what is the hello?", "video": frames}]).plan
    ids = np.where(plan.column("source") == TEXT, plan.column("row"), tiny.VIDEO_ID)
    words = processor.tokenizer("what is the hello?")["input_ids"]
    assert ids.tolist() == [tiny.VIDEO_ID] * 4 * tiny.QUERIES + words  # as its processor writes them
    assert len({tuple(told) for told in plan.column("instruction").tolist()}) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"video_processor_type": "OtherVideoProcessor"}, "supported for this model: InstructBlipVideoVideoProcessor"),
        ({"image_processor_type": "CLIPImageProcessor"}, "InstructBlipVideoImageProcessor, BlipImageProcessor"),
        ({"do_sample_frames": True}, "do_sample_frames is True"),
        ({"image_processor_type": "BlipImageProcessor"}, None),
    ],
)
def test_the_processor_of_a_model_of_videos(change, said, tmp_path):
    pair = tiny.pair("instructblipvideo")
    tiny.save(pair.case, pair.hf, tmp_path)
    edit_json(tmp_path / "video_preprocessor_config.json", **change)
    if said is None:
        assert llava_fast.load(tmp_path).config == pair.ours.config
        return
    with pytest.raises(CheckpointError, match=said):
        llava_fast.load(tmp_path)
