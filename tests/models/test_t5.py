"""T5 behind the decoder's interface: what the parity tests over `tiny.CASES` do not cover."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import T5Config

import llava_fast
from llava_fast.errors import CheckpointError, RequestError
from llava_fast.generation.prefix_cache import PrefixCache
from llava_fast.generation.prompt import read_prompt
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import new_sequence
from llava_fast.inputs.chat.rendering import builtin_template
from llava_fast.models.batch import Batch
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.decoders import DECODERS
from llava_fast.models.quantised import Quantisation, Quantised
from llava_fast.models.recompute import set_recompute
from llava_fast.ops import use_backend
from llava_fast.train.data.pairs import shared_pair
from llava_fast.train.objectives.reference import answer_log_probs
from tests.support import tiny
from tests.support.parity import assert_same_answer, reference_greedy, relative
from tests.support.tiny_checkpoints import edit_json

PICTURE = tiny.picture(60, 90)
REQUESTS = [
    {"prompt": "<image>hello there", "images": [PICTURE]},
    {"prompt": "no picture, but a text that is longer than one block of rows"},
    {"prompt": "<image>hello there, and more", "images": [PICTURE]},
]
ASKED = {"role": "user", "content": "<image>what?"}


def answered(text: str, **more) -> dict:
    return {"messages": [ASKED, {"role": "assistant", "content": text}], "images": [PICTURE], **more}


def answers(scheduler: Scheduler, sampling: Sampling) -> list[list[int]]:
    model = scheduler.runner.model
    made = [new_sequence(model, read_prompt(model.processor, request), sampling) for request in REQUESTS]
    for sequence in made:
        scheduler.add(sequence)
    while not scheduler.is_idle:
        scheduler.step()
    assert [sequence.error for sequence in made] == [None] * 3
    return [sequence.token_ids for sequence in made]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    model = tiny.pair("blip2_t5").ours
    return [model.generate([each], max_new_tokens=24, ignore_eos=True)[0].token_ids for each in REQUESTS]


def test_little_memory_changes_no_answer(alone):
    """Prompts are longer than a pass may be, and a sequence is preempted; its answer's rows then run in one pass."""
    model = tiny.pair("blip2_t5").ours
    cache = model.decoder.new_cache(block_rows=8)
    cache.max_blocks = 19
    scheduler = Scheduler(Runner(model, cache), PrefixCache(cache), chunk_rows=7)
    assert answers(scheduler, Sampling(max_new_tokens=24, ignore_eos=True)) == alone
    assert scheduler.stats.preemptions
    assert not scheduler.stats.reused_rows  # a prompt's rows depend on all of it


def test_no_answer_depends_on_the_company(alone):
    model = tiny.pair("blip2_t5").ours
    scheduler = Scheduler(Runner(model, batch_invariant=True), chunk_rows=7)
    assert answers(scheduler, Sampling(max_new_tokens=24, ignore_eos=True)) == alone


def test_a_repetition_penalty_counts_what_the_decoder_has_read():
    """As in transformers: the answer and the token with which it begins."""
    pair = tiny.pair("blip2_t5")
    inputs = pair.reference_inputs(**REQUESTS[0])
    expected, logits = reference_greedy(pair.hf, inputs | {"repetition_penalty": 1.5})
    (answer,) = pair.ours.generate(REQUESTS[0], max_new_tokens=32, ignore_eos=True, repetition_penalty=1.5)
    assert_same_answer(answer.token_ids, expected, logits)
    assert answer.token_ids != pair.ours.generate(REQUESTS[0], max_new_tokens=32, ignore_eos=True)[0].token_ids


def test_a_stream_a_chat_and_an_end_token():
    model = copy.deepcopy(tiny.pair("blip2_t5").ours)
    question = {"messages": [{"role": "user", "content": "<image>the hello?"}], "images": [PICTURE]}
    (whole,) = model.generate(question, max_new_tokens=12, ignore_eos=True)
    assert "".join(model.stream(question, max_new_tokens=12, ignore_eos=True)) == whole.text
    chat = model.chat()
    first = chat.send("the hello?", images=[PICTURE], max_new_tokens=12, ignore_eos=True)
    assert first.token_ids == whole.token_ids
    second = chat.send("and?", max_new_tokens=5, ignore_eos=True)
    turns = [{"role": "user", "content": "<image>the hello?"}, {"role": "assistant", "content": first.text}]
    turns.append({"role": "user", "content": "and?"})
    (again,) = model.generate({"messages": turns, "images": [PICTURE]}, max_new_tokens=5, ignore_eos=True)
    assert second.token_ids == again.token_ids
    model.config = replace(model.config, eos_token_ids=(whole.token_ids[3],))
    (ended,) = model.generate(question, max_new_tokens=12)
    end = whole.token_ids.index(whole.token_ids[3]) + 1
    assert (ended.token_ids, ended.finish_reason) == (whole.token_ids[:end], "stop")


def test_an_8_bit_cache_stays_near(tmp_path):
    tiny.save(tiny.CASES["blip2_t5"], tiny.pair("blip2_t5").hf, tmp_path)
    model = llava_fast.load(tmp_path, kv_cache="int8")
    options = {"max_new_tokens": 1, "ignore_eos": True, "logprobs": 5}
    stock = tiny.pair("blip2_t5").ours.generate(REQUESTS, **options)
    for found, expected in zip(model.generate(REQUESTS, **options), stock, strict=True):
        assert found.logprobs[0].logprob == pytest.approx(expected.logprobs[0].logprob, abs=0.1)


@pytest.mark.parametrize("how", ["layers", "selective"])
def test_layers_that_run_again_give_the_same_gradients(how):
    model = copy.deepcopy(tiny.pair("blip2_t5").ours).train()
    batch = model.prepare([answered("hello"), answered("a longer answer")], True)
    found = []
    for each in ("none", how):
        set_recompute(model, each)
        calls = []
        inner = model.decoder.base.decoder.block[1].layer[1].EncDecAttention.k
        handle = inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        model(batch, logits="none").loss.backward()
        handle.remove()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert len(calls) == (1 if each == "none" else 2)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_two_answers_share_their_prompt():
    """Preference objectives: the branches' losses and gradients are those of two samples."""
    model = tiny.pair("blip2_t5").ours
    processor, tiles = model.own_processor, []
    pair = shared_pair(processor, answered("the hello a"), answered("the other"), tiles)
    lengths = [[len(branch.ids) for branch in pair.branches]]
    batch = Batch.from_prepared(processor.assemble([pair.pieces], tiles, branches=lengths))
    both = model.prepare([answered("the hello a"), answered("the other")], labels=True)
    found, grads = [], []
    for each in (batch, both):
        model.zero_grad()
        losses = model(each, logits="none").losses
        if each is batch:
            assert len(each.plan.encoded) == 1
            found.append(-answer_log_probs(losses, each.plan)[0][0])
        else:
            sizes = np.bincount(each.plan.column("sequence")[each.plan.column("supervised_row")])
            found.append(torch.stack([part.sum() for part in losses.split(sizes.tolist())]))
        (found[-1] * torch.tensor([1.0, -0.5])).sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    torch.testing.assert_close(found[0], found[1])
    floor = 1e-6 * max(value.abs().max().item() for value in grads[1].values())
    for name, value in grads[1].items():
        torch.testing.assert_close(grads[0][name], value, atol=floor, rtol=1e-3, msg=name)


def test_labels_are_the_answers_tokens_and_the_end():
    processor = tiny.pair("instructblip_t5").ours.own_processor
    plan = processor.prepare([answered("the hello")], labels=True).plan
    words = processor.tokenizer
    assert plan.column("supervised_target").tolist() == words("the hello")["input_ids"]
    prompt = tiny.QUERIES + len(words("what?")["input_ids"])
    assert plan.encoded == (prompt,)
    assert plan.column("supervised_row").tolist() == list(range(prompt, plan.rows - 1))
    assert plan.column("row")[prompt] == tiny.PAD_ID


def test_an_answer_after_earlier_turns():
    """The encoder reads what it reads when the model answers there; the last answer is learnt, preferred and ranked."""
    model = tiny.pair("blip2_t5").ours
    processor, words = model.own_processor, model.tokenizer
    turns = [*answered("hello")["messages"], {"role": "user", "content": "and?"}]
    taught, other = (
        answered("hello", messages=[*turns, {"role": "assistant", "content": text}]) for text in ("the a", "b")
    )
    plan = processor.prepare([taught], labels=True).plan
    asked = answered("hello", messages=turns)
    assert plan.encoded == (read_prompt(processor, asked).encoded_rows,)
    assert plan.column("supervised_target").tolist() == words("the a")["input_ids"]
    assert np.array_equal(plan.column("row")[: plan.encoded[0]], processor.prepare([asked]).plan.column("row")[:-1])
    pair = shared_pair(processor, taught, other, [])
    assert [branch.ids.tolist() for branch in pair.branches] == [words(each)["input_ids"] for each in ("the a", "b")]
    best, worse = model.rank(asked, ["a", "the a"])
    assert best.prompt_tokens == worse.prompt_tokens == plan.encoded[0]
    (said,) = model.generate([asked], max_new_tokens=1)
    assert said.usage.prompt_tokens == plan.encoded[0]


@pytest.mark.parametrize("labels", [True, "original"])
def test_samples_it_cannot_learn_from_say_so(labels):
    processor = tiny.pair("blip2_t5").ours.own_processor
    more = [*answered("hello")["messages"], {"role": "user", "content": "and?"}]
    with pytest.raises(RequestError, match="has turns after its last answer"):
        processor.prepare([answered("hello", messages=more)], labels=labels)
    if labels == "original":
        with pytest.raises(RequestError, match="template 'qwen', and this model's prompt is read by its encoder"):
            replace(processor, template=builtin_template("qwen")).prepare([answered("hello")], labels=labels)
    tokenless = copy.deepcopy(processor.tokenizer)
    tokenless._tokenizer.post_processor = None
    with pytest.raises(RequestError, match="the prompt is empty"):
        read_prompt(replace(processor, tokenizer=tokenless), {"prompt": ""})


def test_a_tied_head_is_read_scaled_and_written(tmp_path):
    case = replace(tiny.CASES["blip2_t5"], text_options={"feed_forward_proj": "relu"})
    hf = tiny.hf_model(case)
    tiny.save(case, hf, tmp_path / "start")
    model = llava_fast.load(tmp_path / "start")
    assert "decoder.lm_head.weight" not in dict(model.named_parameters())
    llava_fast.save(model, tmp_path / "saved")
    inputs = tiny.pair("blip2_t5").reference_inputs(**REQUESTS[0])
    with torch.no_grad():
        expected = hf(**inputs).logits[0]
        for each in (model, llava_fast.load(tmp_path / "saved")):
            assert relative(each(each.prepare(REQUESTS[:1])).logits, expected) < 1e-5


def test_the_published_spelling_of_an_untied_head(tmp_path):
    """config.json of transformers 4, which says so; transformers 5 writes true, and the files decide."""
    tiny.save(tiny.CASES["blip2_t5"], tiny.pair("blip2_t5").hf, tmp_path)
    model = llava_fast.load(tmp_path)
    assert not model.config.decoder.tie_embeddings
    assert not model.config.decoder.scale_outputs
    text = model.config.source["text_config"] | {"tie_word_embeddings": False}
    del text["scale_decoder_outputs"]
    edit_json(tmp_path / "config.json", text_config=text)
    again = llava_fast.load(tmp_path).config.decoder
    assert again == replace(model.config.decoder, fields=again.fields)


def test_float16_is_refused(tmp_path):
    tiny.save(tiny.CASES["blip2_t5"], tiny.pair("blip2_t5").hf, tmp_path)
    said = "a t5 decoder overflows in torch.float16: load with dtype='bfloat16' or 'float32'"
    with pytest.raises(CheckpointError, match=said):
        llava_fast.load(tmp_path, dtype="float16")
    model = llava_fast.load(tmp_path, dtype="bfloat16")
    assert model.generate(REQUESTS, max_new_tokens=3, ignore_eos=True)[2].token_ids


@torch.no_grad()
def test_quantised_at_load_and_saved(tmp_path):
    tiny.save(tiny.CASES["blip2_t5"], tiny.pair("blip2_t5").hf, tmp_path / "start")
    quantisation = Quantisation("int8", head="int8", embeddings="int8")
    model = llava_fast.load(tmp_path / "start", quantize=quantisation)
    assert not any(type(module) is torch.nn.Linear for module in model.decoder.modules())
    batch, dense = model.prepare(REQUESTS), copy.deepcopy(tiny.pair("blip2_t5").ours)
    for path, module in model.decoder.named_modules():
        if isinstance(module, Quantised):
            dense.decoder.get_submodule(path).weight.copy_(module.dense())
    with use_backend("reference"):
        assert relative(model(batch).logits, dense(batch).logits) < 1e-5
        written, expected = (each.generate(REQUESTS, max_new_tokens=4, ignore_eos=True) for each in (model, dense))
    assert [answer.token_ids for answer in written] == [answer.token_ids for answer in expected]
    found = model(batch).logits
    llava_fast.save(model, tmp_path / "saved")
    assert torch.equal(llava_fast.load(tmp_path / "saved")(batch).logits, found)


def test_a_copy_is_independent():
    model = tiny.pair("blip2_t5").ours
    twin = copy.deepcopy(model)
    batch = model.prepare(REQUESTS[:1])
    with torch.no_grad():
        expected = model(batch).logits
        torch.testing.assert_close(twin(batch).logits, expected)
        twin.decoder.layers[0].layer[0].SelfAttention.v.weight.zero_()
        assert not torch.equal(twin(batch).logits, expected)
        torch.testing.assert_close(model(batch).logits, expected)


def test_no_rows_leave_gradients_of_zeros():
    """Of a process that has nothing to do in a step."""
    decoder = copy.deepcopy(tiny.pair("blip2_t5").ours.decoder)
    decoder.zero_grad()
    rows = torch.zeros(0, 64, requires_grad=True)
    out = decoder(rows, torch.zeros(0, dtype=torch.long), Spans((), ()))
    assert out.shape == (0, 64)
    (out.sum() + decoder.logits(out).sum()).backward()
    missing = [n for n, p in decoder.named_parameters() if p.grad is None or p.grad.any()]
    assert [name for name in missing if name != "base.shared.weight"] == []


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        (Spans((0,), (3,)), "needs the number of rows of each prompt"),
        (Spans((0,), (3,), encoded=(4,)), "an encoder reads all 4 rows of a prompt in one pass"),
        (Spans((0,), (3,), encoded=(1,), branches=((1, 1),)), "branches follow at least the first row of an answer"),
    ],
)
def test_rows_that_make_no_sequence_say_so(spans, said):
    with pytest.raises(ValueError, match=said):
        tiny.pair("blip2_t5").ours.decoder(torch.zeros(3, 64), torch.zeros(3, dtype=torch.long), spans)


def test_its_costs_are_those_of_its_linears():
    """Where both halves are equally deep, a row of either passes as many products."""
    hf = T5Config(d_model=8, d_kv=4, d_ff=20, num_heads=3, feed_forward_proj="gated-gelu")
    config = DECODERS["t5"].from_hf(hf, tied=True)
    assert config.layer_matrix_size == 6 * 8 * 12 + 3 * 8 * 20
    with torch.device("meta"):
        decoder = config.build()
    matrices = sum(p.numel() for n, p in decoder.named_parameters() if p.dim() > 1 and "shared" not in n)
    bias = 2 * config.num_heads * 32
    assert matrices - bias == config.num_layers * (2 * config.layer_matrix_size)
    assert config.pairs(0, 10) == 100


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"feed_forward_proj": "none-such"}, "feed_forward_proj"),
        ({"d_kv": 0}, "d_kv"),
        ({"decoder_start_token_id": 999}, "decoder_start_token_id is 999; the vocabulary has"),
        ({"relative_attention_num_buckets": 1}, "relative_attention_num_buckets"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path, change, said):
    tiny.save(tiny.CASES["blip2_t5"], tiny.pair("blip2_t5").hf, tmp_path)
    text = tiny.pair("blip2_t5").ours.config.source["text_config"]
    edit_json(tmp_path / "config.json", text_config=text | change)
    with pytest.raises(CheckpointError, match=said):
        llava_fast.load(tmp_path)


def test_autocast_stays_near_and_every_weight_learns():
    model = tiny.pair("blip2_t5").ours
    batch = model.prepare([answered("hello"), answered("the a")], labels=True)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch, logits="none").loss
    loss.backward()
    assert loss.item() == pytest.approx(model(batch, logits="none").loss.item(), rel=0.1)
    assert [name for name, p in model.decoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    model.zero_grad()


def test_the_loss_of_a_sample_is_that_of_its_answer():
    model = tiny.pair("blip2_t5").ours
    batch = model.prepare([answered("hello"), answered("the a")], labels=True)
    with torch.no_grad():
        out = model(batch, logits="supervised")
        losses = model(batch, logits="none").losses
    target = batch.column("supervised_target").long()
    torch.testing.assert_close(losses, F.cross_entropy(out.logits, target, reduction="none"))
