"""Qwen-VL and Monkey: checkpoints of the published layout against the published code's steps (support/qwen_vl.py),
prompts beyond the trained length, chat, labels, what is saved, and what it cannot be."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_fast
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.errors import CheckpointError, ImageError
from llava_fast.families import family_of_config
from llava_fast.inputs.tiling.coverage import image_coverage
from llava_fast.models.quantised import QuantisedLinear
from tests.generation.test_scheduler import make, run, sequence_of
from tests.models.test_decode_graphs import answers
from tests.support import qwen_vl, tiny
from tests.support.parity import assert_close, assert_same_answer
from tests.support.played import Played
from tests.support.tiny_checkpoints import edit_json

SIZES = [(32, 32), (20, 90), (70, 40)]


@pytest.fixture(scope="module", params=["qwen", "monkey"])
def seen(request, tmp_path_factory):
    """(folder, model, what the published code computes)."""
    folder = tmp_path_factory.mktemp(request.param) / "model-chat"
    monkey = request.param == "monkey"
    weights = qwen_vl.write(folder, monkey)
    return folder, llava_fast.load(folder), qwen_vl.Published(weights, monkey)


def requests() -> list[dict]:
    made = [{"prompt": f"hello <image> {h}x{w}:", "images": [tiny.picture(h, w)]} for h, w in SIZES]
    made.append({"prompt": "a <image><image>\nthe b", "images": [tiny.picture(*size) for size in SIZES[1:]]})
    made.append({"prompt": "only text " * 10})  # 100 rows, beyond the trained length
    return [*made, {"prompt": "only text"}]


@torch.no_grad()
def test_logits_singly_and_batched(seen):
    _, model, published = seen
    expected = []
    for request in requests():
        rows = published.rows(model.tokenizer, request["prompt"], request.get("images", []))
        expected.append(published.logits(rows))
        assert_close("Qwen-VL logits", model(model.prepare([request]), logits="all").logits, expected[-1])
        assert model.processor.count(request).all == len(rows)
    assert max(map(len, expected)) > qwen_vl.SEQ_LENGTH
    together = model(model.prepare(requests()), logits="all").logits
    for found, logits in zip(together.split([len(each) for each in expected]), expected, strict=True):
        assert_close("Qwen-VL logits, packed batch", found, logits)
    padded = model(model.prepare(requests(), layout="padded"), logits="all").logits
    for found, logits in zip(padded, expected, strict=True):
        assert_close("Qwen-VL logits, padded batch", found[: len(logits)], logits)


def test_answers_alone_are_those_of_a_batch_and_of_the_published_code(seen):
    """Some grow beyond the trained length, some prompts are longer and have another RoPE base."""
    _, model, published = seen
    long = {"prompt": "the end " * 22}
    asked = [*requests(), long]
    together = model.generate(asked, max_new_tokens=12, ignore_eos=True)
    for request, answer in zip(asked, together, strict=True):
        rows = published.rows(model.tokenizer, request["prompt"], request.get("images", []))
        expected, steps = published.greedy(rows, 12)
        (alone,) = model.generate([request], max_new_tokens=12, ignore_eos=True)
        assert_same_answer(alone.token_ids, expected, steps)
        assert_same_answer(answer.token_ids, expected, steps)
    just_below = {"prompt": "hi " * 25}
    rows = published.rows(model.tokenizer, just_below["prompt"], [])
    assert qwen_vl.SEQ_LENGTH - 12 < len(rows) < qwen_vl.SEQ_LENGTH
    expected, steps = published.greedy(rows, 24)
    (grown,) = model.generate([just_below], max_new_tokens=24, ignore_eos=True)
    assert_same_answer(grown.token_ids, expected, steps)


def test_long_prompts_in_chunks_and_preempted_keep_their_rope(seen):
    """Each has one base from its prompt's first row to its answer's last, whoever runs beside it."""
    _, model, published = seen
    asked = [{"prompt": word * 22} for word in ("the end ", "hello you ")] + [{"prompt": "short " * 3}]
    scheduler = make(model, blocks=17, reuse=True, chunk_rows=7)
    sequences = [sequence_of(model, request, max_new_tokens=40) for request in (*asked, asked[0])]
    run(scheduler, *sequences)
    assert scheduler.stats.preemptions
    assert not any(each.reused_rows for each in sequences)
    for request, sequence in zip((*asked, asked[0]), sequences, strict=True):
        expected, steps = published.greedy(published.rows(model.tokenizer, request["prompt"], []), 40)
        assert_same_answer(sequence.token_ids, expected, steps)


def test_decoding_from_graphs(seen, served):
    """Replays scale the queries of rows beyond the trained length; a prompt beyond it runs the modules."""
    _, model, published = seen
    asked = [{"prompt": "hi " * 25}, {"prompt": "only text"}]
    found, runner = answers(model, asked, Played, tokens=12)
    for request, tokens in zip(asked, found, strict=True):
        rows = published.rows(model.tokenizer, request["prompt"], [])
        assert_same_answer(tokens, *published.greedy(rows, 12))
    replays = runner.device.graphs.replays
    assert replays > 8
    (tokens,), runner = answers(model, [{"prompt": "the end " * 22}], Played, tokens=4)
    rows = published.rows(model.tokenizer, "the end " * 22, [])
    assert_same_answer(tokens, *published.greedy(rows, 4))
    assert runner.device.graphs.replays == 0


@torch.no_grad()
def test_candidates_have_the_rope_of_their_prompt(seen):
    """However long they are; also those that follow a prompt beyond the trained length."""
    _, model, published = seen
    texts = ["the " * 90, "hi", "foo " * 40]
    for prompt in ("only text", "the end " * 22):
        rows = len(published.rows(model.tokenizer, prompt, []))
        for each in model.rank({"prompt": prompt}, texts):
            x = published.rows(model.tokenizer, prompt + each.text, [])
            logits = published.logits(x, rows)[-len(each.token_ids) - 1 : -1].double().log_softmax(-1)
            expected = logits[range(len(each.token_ids)), each.token_ids].sum().item()
            assert each.log_likelihood == pytest.approx(expected, rel=1e-4)
    assert rows > qwen_vl.SEQ_LENGTH


def test_quantised_while_it_loads(seen, tmp_path):
    folder, model, _ = seen
    rounded = llava_fast.load(folder, quantize="int8")
    assert isinstance(rounded.decoder.layers[0].attn.c_attn, QuantisedLinear)
    batch = rounded.prepare(requests()[:1])
    with torch.no_grad():
        found, exact = (each(batch, logits="all").logits for each in (rounded, model))
    assert 0 < (found - exact).norm() / exact.norm() < 0.1
    for layout in ("hf", "original"):
        with pytest.raises(CheckpointError, match=f"weights of a {model.config.model_type} cannot be saved: save the"):
            llava_fast.save(rounded, tmp_path / "saved", layout=layout)


def test_what_it_sees(seen):
    """The server's plan: one view, whose rows have no place of their own."""
    _, model, published = seen
    coverage = image_coverage(model.processor.geometry, 40, 90)
    ((region,),) = coverage.regions
    assert region.box == (0, 0, 90, 40)
    assert region.tokens == len(coverage.rows) - 2 == (5 if published.monkey else 1) * qwen_vl.QUERIES
    assert llava_fast.count_tokens(model, 40, 90) == len(coverage.rows)


def test_gradients_without_extensions(seen):
    _, model, published = seen
    turns = [
        {"role": "user", "content": "<image> what?" + " and what" * 10},
        {"role": "assistant", "content": "the hello"},
    ]
    request = {"messages": turns, "images": [tiny.picture(20, 90)]}
    model.train()
    batch = model.prepare([request], labels=True)
    model.zero_grad()
    model(batch).loss.backward()
    segments = model.processor.template.segments(turns, add_generation_prompt=False)
    prompt = "".join(qwen_vl.CUT * each.cut + each.text for each in segments)
    rows = published.rows(model.tokenizer, prompt, request["images"])
    assert len(rows) > qwen_vl.SEQ_LENGTH
    logits = published.logits(rows, training=True)
    supervised = batch.column("supervised_row").long()
    torch.nn.functional.cross_entropy(logits[supervised], batch.column("supervised_target").long()).backward()
    names = family_of_config(model.config).names
    floor = 1e-6 * max(each.grad.abs().max() for each in published.w.values() if each.grad is not None)
    scales: dict[str, list] = {}  # numbers: those of a Linear's windows are compared as one tensor
    for name, parameter in model.named_parameters():
        expected = published.w[names.to_stored(name, "original", model.config)].grad
        assert parameter.grad is not None, name
        if name.endswith("lora_scale"):
            scales.setdefault(name.rpartition("_lora.")[0], []).append((parameter.grad, expected))
        elif expected.abs().max() >= floor:
            assert_close("Qwen-VL gradients", parameter.grad, expected)
    for pairs in scales.values():
        assert_close("Qwen-VL gradients", *(torch.cat(each) for each in zip(*pairs, strict=True)))
    for value in published.w.values():
        value.grad = None
    model.zero_grad()
    model.eval()


def test_saved_it_is_the_same_to_the_bit(seen, tmp_path):
    folder, model, _ = seen
    llava_fast.save(model, tmp_path / "saved", layout="original")
    written, read = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "saved", folder))
    assert written == read | {"torch_dtype": "float32"}
    stored, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", folder))
    assert stored.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in stored.items())
    again = llava_fast.load(tmp_path / "saved")
    assert again.config == model.config
    assert again.processor.template.name == model.processor.template.name
    text = "<|im_start|>hello the <box>(1,2)</box> <img>x</img>\n\nCafe\u0301 <|extra_7|>"
    assert again.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    with pytest.raises(CheckpointError, match="has no other layout than 'original'"):
        llava_fast.save(model, tmp_path / "hf", layout="hf")


def test_files_written_anew_describe_the_same_model(seen, tmp_path):
    folder, _, _ = seen
    model = llava_fast.load(folder)
    model.config = dataclasses.replace(model.config, source={})
    llava_fast.save(model, tmp_path / "anew", layout="original")
    assert load_checkpoint(tmp_path / "anew").config == load_checkpoint(folder).config


def asked(model, messages: list[dict], labels="original") -> tuple[list[str], list[str]]:
    """(tokens of the prompt, those that are supervised); an image is one token."""
    outline = model.processor.outline({"messages": messages, "images": ["a"] * str(messages).count("<image>")}, labels)
    ids, kept = [], []
    for part in outline:
        ids += part.ids.tolist() if hasattr(part, "ids") else [qwen_vl.IMG + 2]
        kept += [False] if not hasattr(part, "ids") else part.supervised.tolist() if labels else [False] * len(part.ids)
    tokens = model.tokenizer.convert_ids_to_tokens(ids)
    return tokens, [token for token, each in zip(tokens, kept, strict=True) if each]


def test_chat_and_labels(seen):
    """Roles are not supervised, start and end of every turn are; each text is tokenised by itself."""
    _, model, published = seen
    messages = [
        {"role": "user", "content": "<image>\nwho"},
        {"role": "assistant", "content": "\nus"},
        {"role": "user", "content": "and<image>er"},
        {"role": "assistant", "content": " foo"},
    ]
    if published.monkey:
        text = model.processor.template.render(messages[:1])
        assert text == "<image> who Answer: "
        tokens, kept = asked(model, [messages[0], {"role": "assistant", "content": "foo"}])
        assert "".join(tokens) == "<imgpad>ĠwhoĠAnswer:Ġfoo<|endoftext|>"
        assert "Ġfoo" not in tokens  # one token if it were tokenised with the prompt
        assert "".join(kept) == "foo<|endoftext|>"
        return
    text = model.processor.template.render(messages)
    turns = [
        "system\nYou are a helpful assistant.",
        "user\nPicture 1: <image>\nwho",
        "assistant\n\nus",
        "user\nandPicture 2: <image>\ner",
        "assistant\n foo",
    ]
    assert text == "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)
    tokens, kept = asked(model, messages)
    spelt = text.replace("<image>", "<imgpad>").replace(" ", "Ġ").replace("\n", "Ċ")
    assert "".join(tokens) == spelt
    assert "ĊĊ" not in tokens
    ends = ["<|im_end|>", "Ċ"]
    silent = ["<|im_start|>", *ends]
    assert kept == [*silent, *silent, "<|im_start|>", "Ċ", "us", *ends, *silent, "<|im_start|>", "Ġfoo", *ends]
    assert asked(model, messages, "answers")[1] == ["Ċ", "us", "<|im_end|>", "Ġfoo", "<|im_end|>"]


def test_a_prompt_has_the_tokens_that_training_reads(seen):
    """Each text is tokenised by itself there too, also the earlier answers."""
    _, model, published = seen
    messages = [
        {"role": "user", "content": "\n\nfoo"},
        {"role": "assistant", "content": "foo" if published.monkey else "\n\nthe"},
        {"role": "user", "content": "\nfoo"},
        {"role": "assistant", "content": "foo"},
    ]
    prompt, _ = asked(model, messages[:3], False)
    whole, _ = asked(model, messages, "answers")
    assert prompt == whole[: len(prompt)]
    assert "".join(whole[len(prompt) :]).startswith("foo")


def test_the_base_model_completes_a_text(tmp_path):
    qwen_vl.write(tmp_path, chat_format="raw")
    model = llava_fast.load(tmp_path)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe:"}]}
    assert model.processor.template.render([message]) == "Picture 1: <image>\nDescribe:"
    edit_json(tmp_path / "generation_config.json", chat_format="tables")
    with pytest.raises(CheckpointError, match="chat_format is 'tables'; supported are chatml, raw"):
        llava_fast.load(tmp_path)


VISUAL = qwen_vl.config(monkey=True)["visual"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"visual": None}, "has no section visual, so it is a language model"),
        ({"architectures": ["TextMonkeyLMHeadModel"]}, "architectures is 'TextMonkeyLMHeadModel'; supported are "),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5; supported is 1.0"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False; supported is True"),
        ({"kv_channels": 16}, "4 num_attention_heads of 16 kv_channels do not make a hidden_size of 128"),
        ({"intermediate_size": 33}, "intermediate_size is 33; two Linears share it"),
        ({"max_position_embeddings": 40}, "max_position_embeddings is 40, less than a seq_length of 80"),
        ({"visual": VISUAL | {"output_dim": 64}}, "visual.output_dim is 64; it must be hidden_size"),
        ({"visual": VISUAL | {"n_queries": 5}}, "visual.n_queries is 5; it must be a square"),
        ({"visual": VISUAL | {"heads": 5}}, "visual.width 32 is no multiple of 5 heads"),
        ({"visual": VISUAL | {"lora_repeat_num": 5}}, "visual: "),
        ({"visual": VISUAL | {"image_size": 100}}, "visual: "),
    ],
)
def test_what_it_cannot_be_is_refused(seen, tmp_path, change, said):
    shutil.copytree(seen[0], tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", **change)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "copy")


def test_buffers_of_older_files_are_left_out(seen, tmp_path):
    folder, model, _ = seen
    shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    buffers = {f"transformer.h.0.attn.{name}": torch.ones(1) for name in ("masked_bias", "rotary_emb.inv_freq")}
    save_file(tensors | buffers, tmp_path / "copy" / "model.safetensors")
    again = llava_fast.load(tmp_path / "copy")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_another_tokenizer_is_refused(seen, tmp_path):
    shutil.copytree(seen[0], tmp_path / "copy")
    lines = (tmp_path / "copy" / "qwen.tiktoken").read_text().splitlines()
    (tmp_path / "copy" / "qwen.tiktoken").write_text("\n".join(lines[:-1]))
    with pytest.raises(CheckpointError, match="gives '<img>' the id"):
        llava_fast.load(tmp_path / "copy")
    (tmp_path / "copy" / "qwen.tiktoken").write_text("\n".join([*lines[:-1], "no base64"]))
    with pytest.raises(CheckpointError, match=f"line {len(lines)} is no token in base64 and its rank"):
        llava_fast.load(tmp_path / "copy")


def test_videos_are_refused(seen):
    frames = np.stack([tiny.picture(30, 30)] * 2)
    with pytest.raises(ImageError, match="videos are not supported for this kind of checkpoint"):
        seen[1].prepare([{"prompt": "<video>", "video": frames}])
