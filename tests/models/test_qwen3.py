"""Qwen 3 as a decoder, beyond what tests/test_parity_* ask of every case: its files, and where it may run."""

from dataclasses import replace

import pytest
import torch
from transformers import LlavaNextForConditionalGeneration, Qwen3Config

import llava_fast
from llava_fast.errors import CheckpointError
from llava_fast.families import family_of_config, read_config
from llava_fast.families.base import TokenIds
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.blocks.native_step import step_weights
from llava_fast.models.decoders.stack import _PLAIN
from llava_fast.ops import use_backend
from llava_fast.storage.files import write_json
from tests.support import tiny
from tests.support.parity import assert_close, reference_logits

PROMPT = {"prompt": "<image> hello there", "images": [tiny.picture(60, 90)]}


@pytest.mark.parametrize("bias", [False, True])
def test_a_llava_of_one_tile_gives_transformers_logits(bias, tmp_path):
    case = tiny.Case("llava", Qwen3Config, {"head_dim": 32, "attention_bias": bias}, tile=48)
    model = tiny.hf_model(case)
    tiny.save(case, model, tmp_path)
    ours = llava_fast.load(tmp_path)
    biases = [name for name, _ in ours.decoder.layers[0].self_attn.named_parameters() if name.endswith("bias")]
    assert len(biases) == 4 * bias
    pair = tiny.Pair(case, model, tiny.hf_processor(case), ours)
    with torch.no_grad():
        found = ours(ours.prepare([PROMPT]), logits="all").logits
    assert_close("logits", found, reference_logits(model, pair.reference_inputs(**PROMPT)))


@torch.no_grad()
def test_kernels_give_what_steps_give():
    decoder = tiny.pair("next_qwen3").ours.decoder
    x, position = torch.randn(5, decoder.config.hidden_size), torch.arange(5)
    expected = decoder(x, position, Spans((0,), (5,)))
    with use_backend("triton"):
        assert_close("Qwen 3 with kernels", decoder(x, position, Spans((0,), (5,))), expected)


@torch.no_grad()
def test_a_step_of_generation_is_no_native_step():
    """decoder_step knows no norm over heads: it must leave this decoder alone, and refuse it where it is asked for."""
    decoder = tiny.pair("next_qwen3").ours.decoder
    assert step_weights(decoder, _PLAIN, torch.zeros(1, 64), Spans((0,), (1,), (0,), (0,))) is None
    llama = tiny.pair("next").ours.decoder
    assert step_weights(llama, _PLAIN, torch.zeros(1, 64), Spans((0,), (1,), (0,), (0,))) is not None


@pytest.mark.parametrize("name", ["next_qwen3", "onevision_qwen3"])
def test_accelerate_gives_what_transformers_gives(name):
    pair = tiny.pair(name)
    model = llava_fast.accelerate(tiny.hf_model(pair.case))
    inputs = pair.reference_inputs(**PROMPT)
    assert_close("accelerated Qwen 3", reference_logits(model, inputs), reference_logits(pair.hf, inputs), 1e-5)


def test_saved_it_is_read_by_both(tmp_path):
    pair = tiny.pair("next_qwen3")
    llava_fast.save(pair.ours, tmp_path / "saved")
    again = llava_fast.load(tmp_path / "saved")
    stock, report = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = pair.hf.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in stock.state_dict().items())
    assert again.config == pair.ours.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), pair.ours.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="the original layout has no 'qwen3' decoder, only llama, mistral, qwen2"):
        llava_fast.save(pair.ours, tmp_path / "original", layout="original")
    assert not (tmp_path / "original").exists()


@pytest.mark.parametrize("name", ["next_qwen3", "onevision_qwen3"])
def test_a_config_that_is_written_describes_the_same_decoder(name, tmp_path):
    """As for one that came in another layout, whose config.json is made anew."""
    config = tiny.pair(name).ours.config
    tiny.save(tiny.CASES[name], tiny.pair(name).hf, tmp_path)
    tokens = TokenIds(config.image_token_id, config.video_token_id, config.decoder.vocab_size)
    written = family_of_config(config).write(replace(config, source={}), tokens)
    write_json(tmp_path / "config.json", written)
    assert read_config(tmp_path)[0].decoder == config.decoder
