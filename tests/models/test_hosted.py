"""Decoders that transformers runs (hosted): what the parity tests over `tiny.CASES` do not cover."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration, OPTConfig, PhiConfig

import llava_fast
from llava_fast.errors import CheckpointError, RecipeError
from llava_fast.generation.prefix_cache import PrefixCache
from llava_fast.generation.prompt import read_prompt
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import new_sequence
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.decoders import DECODERS
from llava_fast.models.quantised import Quantisation, Quantised, QuantisedLinear
from llava_fast.models.recompute import set_recompute
from llava_fast.ops import use_backend
from llava_fast.train import objective, run
from llava_fast.train.parallel import World, _check_heads
from llava_fast.train.recipe import parse_recipe
from tests.fake_gpu.programs import RECIPE
from tests.support import tiny
from tests.support.parity import relative
from tests.support.rounded_rows import rounding_error
from tests.support.tiny_checkpoints import edit_json, read_hf_config

NAMES = ("llava_mpt", "llava_opt", "llava_phi", "next_stablelm")
PICTURE = tiny.picture(60, 90)
REQUESTS = [
    {"prompt": "<image>hello there", "images": [PICTURE]},
    {"prompt": "no picture, but a text that is longer than one block of rows"},
    {"prompt": "<image>hello there, and more", "images": [PICTURE]},
]
TALK = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "an answer"}]


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_prompts_and_shared_beginnings_change_no_answer(name):
    model = tiny.pair(name).ours
    options = {"max_new_tokens": 8, "ignore_eos": True}
    expected = [model.generate([request], **options)[0].token_ids for request in REQUESTS]
    cache = model.decoder.new_cache(keep_bytes=1 << 30, block_rows=16)
    scheduler = Scheduler(Runner(model, cache), PrefixCache(cache), chunk_rows=7, max_running=2)
    made = [new_sequence(model, read_prompt(model.processor, request), Sampling(**options)) for request in REQUESTS]
    for sequence in made:
        scheduler.add(sequence)
    while not scheduler.is_idle:
        scheduler.step()
    assert [sequence.token_ids for sequence in made] == expected
    assert scheduler.stats.reused_rows


@pytest.mark.parametrize("how", ["layers", "selective"])
@pytest.mark.parametrize("name", NAMES)
def test_layers_that_run_again_give_the_same_gradients(name, how, monkeypatch):
    model = copy.deepcopy(tiny.pair(name).ours).train()
    batch = model.prepare([{"messages": TALK, "images": [PICTURE]}, {"messages": TALK, "images": [PICTURE]}], True)
    found = []
    for each in ("none", how):
        set_recompute(model, each)
        calls = []
        attention = getattr(model.decoder.layers[1], "attn" if name == "llava_mpt" else "self_attn")
        handle = attention.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        model(batch, logits="none").loss.backward()
        handle.remove()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert len(calls) == (1 if each == "none" else 2)
    assert found[0].keys() == found[1].keys()
    for n, value in found[0].items():
        torch.testing.assert_close(found[1][n], value, msg=n)


def test_a_copy_is_independent():
    model = tiny.pair("llava_opt").ours
    twin = copy.deepcopy(model)
    batch = model.prepare(REQUESTS[:1])
    with torch.no_grad():
        expected = model(batch).logits
        torch.testing.assert_close(twin(batch).logits, expected)
        twin.decoder.layers[0].fc1.weight.zero_()
        assert not torch.equal(twin(batch).logits, expected)
        torch.testing.assert_close(model(batch).logits, expected)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_leave_gradients_of_zeros(name):
    """Of a process that has nothing to do in a step."""
    decoder = copy.deepcopy(tiny.pair(name).ours.decoder)
    rows = torch.zeros(0, 64, requires_grad=True)
    out = decoder(rows, torch.zeros(0, dtype=torch.long), Spans((), ()))
    assert out.shape == (0, 64)
    out.sum().backward()
    assert rows.grad.shape == (0, 64)
    weight = next(each.weight for each in decoder.layers[0].modules() if isinstance(each, torch.nn.Linear))
    assert weight.grad is not None
    assert not weight.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_quantised_at_load_and_saved(name, tmp_path):
    tiny.save(tiny.CASES[name], tiny.pair(name).hf, tmp_path / "start")
    quantisation = Quantisation("int8", head="int8", embeddings="int8")
    model = llava_fast.load(tmp_path / "start", quantize=quantisation)
    assert not any(type(module) in (torch.nn.Linear, torch.nn.Embedding) for module in model.decoder.modules())
    batch = model.prepare(REQUESTS)
    dense, products = copy.deepcopy(tiny.pair(name).ours), []
    for path, module in model.decoder.named_modules():
        if isinstance(module, Quantised):
            dense.decoder.get_submodule(path).weight.copy_(module.dense())
        if isinstance(module, QuantisedLinear):
            module.register_forward_hook(lambda module, args, out: products.append((module, args[0], out)))
    with use_backend("reference"):
        assert relative(model(batch).logits, dense(batch).logits) < 1e-5
    products.clear()
    found = model(batch).logits
    assert len(products) == sum(isinstance(module, QuantisedLinear) for module in model.modules())
    for module, x, out in products:  # each may round its rows to 8 bits, a scale for at most 128 entries
        rows, bias = x.flatten(0, -2), module.bias
        exact = F.linear(rows.double(), module.dense(torch.float64), None if bias is None else bias.double())
        error = (out.flatten(0, -2) - exact).abs()
        assert (error <= rounding_error(rows, module.quantised, bias, 128)).all()
    llava_fast.save(model, tmp_path / "saved")
    assert torch.equal(llava_fast.load(tmp_path / "saved")(batch).logits, found)


def hf_llava(folder, text, **options):
    vision = tiny.hf_config(tiny.CASES["llava15"]).vision_config
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=tiny.IMAGE_ID, **options)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    tiny.image_processor(tiny.CASES["llava15"]).save_pretrained(folder)


SIZES = {**tiny.TEXT, "vocab_size": tiny.VOCABULARY, "num_attention_heads": 4}


def test_dropout_of_the_config_is_not_applied_and_is_saved(tmp_path):
    text = PhiConfig(**SIZES, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5)
    hf_llava(tmp_path / "model", text)
    model = llava_fast.load(tmp_path / "model", chat_template="vicuna_v1")
    batch = model.prepare(REQUESTS)
    with torch.no_grad():
        assert torch.equal(model.train()(batch).logits, model.eval()(batch).logits)
    llava_fast.save(model, tmp_path / "saved")
    assert LlavaConfig.from_pretrained(tmp_path / "saved").text_config.resid_pdrop == 0.5


def test_a_tied_head_is_read_and_written(tmp_path):
    """In this package OPT may have one; transformers' LLaVA fails to build it."""
    hf_llava(tmp_path / "model", PhiConfig(**SIZES, tie_word_embeddings=True), tie_word_embeddings=True)
    model = llava_fast.load(tmp_path / "model", chat_template="vicuna_v1")
    assert "decoder.lm_head.weight" not in dict(model.named_parameters())
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        ids = model.tokenizer("hello there", return_tensors="pt").input_ids
        expected = hf(input_ids=ids).logits[0]
        torch.testing.assert_close(model(model.prepare([{"prompt": "hello there"}]), logits="all").logits, expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"word_embed_proj_dim": 32}, "word_embed_proj_dim is 32"),
        ({"num_attention_heads": 5}, "hidden_size 64 has no 5 equal num_attention_heads"),
        ({"activation_function": "none such"}, "transformers cannot build this opt decoder: .*none such"),
        ({"model_type": "falcon"}, "text_config.model_type is 'falcon'; supported are"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: Input should be greater than or equal to 1"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path, change, said):
    text = tiny.hf_config(tiny.CASES["llava_opt"]).text_config.to_dict()
    tiny.hf_config(tiny.CASES["llava_opt"]).save_pretrained(tmp_path)
    tiny.image_processor(tiny.CASES["llava_opt"]).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", text_config=text | change)
    with pytest.raises(CheckpointError, match=said):
        read_hf_config(tmp_path)


def test_rope_that_follows_the_batch_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match="rope_type is 'dynamic'; supported with a phi decoder are default, linear"):
        DECODERS["phi"].from_hf(PhiConfig(**SIZES, rope_parameters=rope), tied=False)


def test_it_is_not_split_over_a_tensor_mesh():
    class Mesh:
        def size(self):
            return 2

    with pytest.raises(RecipeError, match="a decoder of type opt is not split"):
        _check_heads(tiny.pair("llava_opt").ours, Mesh())


def test_its_costs_are_those_of_its_linears():
    config = DECODERS["opt"].from_hf(OPTConfig(hidden_size=8, ffn_dim=20, num_attention_heads=2), tied=True)
    assert config.layer_matrix_size == 4 * 8 * 8 + 2 * 8 * 20
    assert config.kept_per_row(2)[1] == 2 * (8 + 4 * 8 + 20 + 8)


def test_linear_rope_stretches_the_context():
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}
    config = DECODERS["phi"].from_hf(PhiConfig(**SIZES, rope_parameters=rope), tied=False)
    assert config.context_length == 2 * config.max_positions


def test_samples_longer_than_learned_positions_are_refused(monkeypatch):
    model = copy.deepcopy(tiny.pair("llava_opt").ours)
    most = model.config.decoder.max_positions
    monkeypatch.setattr(objective, "load", lambda *_, **__: model)
    recipe = parse_recipe({**RECIPE, "parallel": {"kind": "none"}, "data": {**RECIPE["data"], "max_length": most + 1}})
    with pytest.raises(RecipeError, match=f"data.max_length: the decoder has {most} positions, fewer than {most + 1}"):
        run.load_model(recipe, World(0, 1, torch.device("cpu")))
