"""Parity at the real widths of LLaVA-1.5-7B: CLIP-L/14-336 whole and two of its decoder layers, random weights.

Takes a minute or two and about 7 GB: both sides share their weights, and only the decoder layers and the projector
have gradients.
"""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.initialization import no_init_weights
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_fast.families.llava_names import from_stored
from llava_fast.generation.prompt import Part, Prompt
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampler, Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import Sequence
from llava_fast.generation.text import TextDecoder
from llava_fast.inputs.chat.rendering import builtin_template
from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.plan.plan import TextPiece, VisualPiece, build_plan
from llava_fast.inputs.prepared import Prepared
from llava_fast.inputs.processor import Processor
from llava_fast.inputs.tiling.anyres import image_rows, image_views
from llava_fast.models.batch import Batch
from llava_fast.models.vlm import LlavaModel
from tests.support import tiny
from tests.support.parity import assert_close, assert_same_answer, reference_greedy
from tests.support.tiny_checkpoints import read_hf_config

IMAGE_TOKEN = 32000
TRAINED = ("decoder.layers.", "projector.")


@pytest.fixture(scope="module")
def reference():
    torch.set_num_threads(2)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(vocab_size=32064, num_hidden_layers=2)  # the other defaults are Llama-7B's
    assert (text.hidden_size, text.intermediate_size, text.num_attention_heads) == (4096, 11008, 32)
    with no_init_weights():
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, vision_feature_layer=-2)
        ).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        width = parameter.shape[-1]
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=width**-0.5 if parameter.dim() > 1 else 0.02)
        parameter.requires_grad_(from_stored(name).startswith(TRAINED))
    yield model
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    """Ours, on the very same weights."""
    folder = tmp_path_factory.mktemp("config")
    reference.config.save_pretrained(folder)
    with torch.device("meta"):
        ours = LlavaModel(read_hf_config(folder))
    for name, parameter in reference.named_parameters():
        owner, _, leaf = from_stored(name).rpartition(".")
        shared = torch.nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        setattr(ours.get_submodule(owner), leaf, shared)
    assert not any(parameter.is_meta for parameter in ours.parameters())
    return ours.eval()


@pytest.mark.timeout(900)  # alone on two cores it takes about one minute
def test_forward_backward_and_decoding(reference, model):
    rng = np.random.default_rng(0)
    image = tiny.picture(336, 336)
    before, after = rng.integers(3, 32000, 5).astype(np.int32), rng.integers(3, 32000, 19).astype(np.int32)
    supervised = np.arange(19) >= 11

    geometry = model.config.geometry
    tiles = make_tiles(image, image_views(geometry, 336, 336), 336)
    rows = image_rows(geometry, 336, 336)
    pieces = [TextPiece(before), VisualPiece(rows), TextPiece(after, supervised)]
    batch = Batch.from_prepared(Prepared(tiles, build_plan([pieces], geometry.tower_rows_per_tile)))
    ids = np.concatenate([before, np.full(576, IMAGE_TOKEN), after]).astype(np.int64)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)([image], return_tensors="pt")
    inputs = {"input_ids": torch.from_numpy(ids)[None], "pixel_values": pixels["pixel_values"]}
    assert batch.plan.rows == len(ids)

    labels = torch.full((1, len(ids)), -100)
    labels[0, -19:][torch.from_numpy(supervised)] = torch.from_numpy(after[supervised].astype(np.int64))
    expected = reference(**inputs, labels=labels)
    expected.loss.backward()
    found = model(batch)
    found.loss.backward()
    assert_close("real width, logits", found.logits, expected.logits[0, -9:-1])
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    gradients = {from_stored(name): parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(TRAINED), name
        if parameter.grad is not None:
            assert_close("real width, gradients", parameter.grad, gradients[name])
            parameter.grad = None
    reference.zero_grad()

    answer, logits = reference_greedy(reference, inputs, tokens=4)
    words = tiny.tokenizer()
    prompt = Prompt([Part(pieces[0]), Part(pieces[1], [tiles]), Part(TextPiece(after))])
    sequence = Sequence(prompt, Sampler(Sampling(), None, []), TextDecoder(words), frozenset(), 4)
    model.processor = Processor(geometry, words, IMAGE_TOKEN, builtin_template("vicuna_v1"))
    scheduler = Scheduler(Runner(model))
    scheduler.add(sequence)
    while not scheduler.is_idle:
        scheduler.step()
    assert_same_answer(sequence.token_ids, answer, logits)
