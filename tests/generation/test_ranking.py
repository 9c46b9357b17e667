"""Likelihoods of candidate answers: transformers' teacher-forced log-probabilities, whatever shares a pass."""

from dataclasses import replace

import pytest
import torch

from llava_fast.errors import GenerationError, PromptTooLongError, RequestError
from llava_fast.generation import ranking
from llava_fast.generation.ranking import score_candidates
from llava_fast.inputs.chat.rendering import builtin_template
from tests.support import tiny
from tests.support.parity import forget_rope

CANDIDATES = ["hello", "hello the a", "a", "the", "\u00e4 hello, and more of it", "a"]
REQUEST = {"prompt": "<image>what is <image>this?", "images": [tiny.picture(60, 90), tiny.picture(30, 30)]}
NAMES = ["next", "next_mistral_window", "next_dynamic_rope", "video", "blip2", "instructblip", "llava_mpt"]


@torch.no_grad()
def teacher_forced(pair, request: dict, texts: list[str]) -> list[tuple[list[int], float]]:
    """(the tokens of each text after a verbatim prompt, the sum of their log-probabilities) in transformers. All begin
    at the first token that joins the prompt and one of the texts."""
    asked = {"images": request.get("images", ()), "question": request["prompt"].replace("<image>", "")}
    before, *whole = (pair.reference_inputs(request["prompt"] + more, **asked) for more in ("", *texts))
    own = before["input_ids"][0].tolist()
    start = len(own)
    for each in whole:
        same = [a == b for a, b in zip(each["input_ids"][0].tolist(), own, strict=False)]
        start = min(start, len(same) if all(same) else same.index(False))
    found = []
    for each in whole:
        forget_rope(pair.hf)
        logits, ids = pair.hf(**each).logits[0].double().log_softmax(-1), each["input_ids"][0]
        found.append((ids[start:].tolist(), logits[range(start - 1, len(ids) - 1), ids[start:]].sum().item()))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_transformers(name):
    pair = tiny.pair(name)
    requests = [REQUEST, {"prompt": "no picture, but "}]
    if pair.case.kind in ("blip-2", "instructblip"):
        requests[0] = {"prompt": "<image>what is this?", "images": REQUEST["images"][:1]}
    together = score_candidates(pair.ours, requests, [CANDIDATES, CANDIDATES[:3]])
    for request, found in zip(requests, together, strict=True):
        for each, (ids, expected) in zip(
            found, teacher_forced(pair, request, [each.text for each in found]), strict=True
        ):
            assert each.token_ids == ids
            assert each.log_likelihood == pytest.approx(expected, rel=1e-4)
            assert each.mean_log_likelihood == pytest.approx(expected / len(ids), rel=1e-4)
            assert not each.is_greedy
    assert found[2].log_likelihood != pytest.approx(together[0][2].log_likelihood, rel=1e-3)


@pytest.mark.parametrize("name", ["blip2_t5", "instructblip_t5"])
def test_equal_to_transformers_with_an_encoder(name):
    """An answer is tokenised alone, and its end token is scored."""
    pair = tiny.pair(name)
    request = {"prompt": "<image>what is this?", "images": REQUEST["images"][:1]}
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    by_messages = {"messages": asked, "images": request["images"]}
    verbatim, answers = score_candidates(pair.ours, [request, by_messages], [CANDIDATES, CANDIDATES])
    inputs = pair.reference_inputs(request["prompt"], request["images"])
    for each, answer in zip(verbatim, answers, strict=True):
        ids = pair.ours.tokenizer(each.text)["input_ids"]
        given = inputs | {"decoder_input_ids": torch.tensor([[tiny.PAD_ID, *ids[:-1]]])}
        with torch.no_grad():
            logits = pair.hf(**given).logits[0].double().log_softmax(-1)
        assert each.token_ids == answer.token_ids == ids
        assert each.log_likelihood == pytest.approx(logits[range(len(ids)), ids].sum().item(), rel=1e-4)


@pytest.mark.parametrize("literal", [False, True])
def test_candidates_of_an_encoder_decoder_are_read_as_answers_are(literal):
    """An end token is written once; with literal text it is text."""
    model = tiny.pair("blip2_t5").ours
    processor = replace(model.own_processor, literal_text=literal)
    by_messages = {"messages": [{"role": "user", "content": "hello"}]}
    verbatim, answers = score_candidates(
        model, [{"prompt": "hello"}, by_messages], [["a</s>", "b"]] * 2, processor=processor
    )
    assert [each.token_ids for each in verbatim] == [each.token_ids for each in answers]
    assert verbatim[0].token_ids.count(model.tokenizer.eos_token_id) == 1
    if not literal:
        with pytest.raises(RequestError, match="placeholder"):
            model.rank({"prompt": "hello"}, ["a <image>"])
        with pytest.raises(RequestError, match="embeddings for 5 tokens"):
            score_candidates(
                model, [{"prompt": ""}], [["hello"]], processor=replace(processor, vocabulary=5, answer_start=0)
            )


@pytest.fixture(scope="module")
def model():
    return tiny.pair("next").ours


def test_order_and_passes(model, monkeypatch):
    by_sum, by_mean = model.rank(REQUEST, CANDIDATES), model.rank(REQUEST, CANDIDATES, by="mean")
    assert [each.log_likelihood for each in by_sum] == sorted((e.log_likelihood for e in by_sum), reverse=True)
    means = [each.mean_log_likelihood for each in by_mean]
    assert means == sorted(means, reverse=True)
    assert [each.index for each in by_sum] != [each.index for each in by_mean]
    assert by_sum[0].text == CANDIDATES[by_sum[0].index]
    assert [each.index for each in by_sum if each.text == "a"] == [2, 5]  # equal: in the order given
    monkeypatch.setattr(ranking, "PASS_ROWS", 4)
    for one, other in zip(by_sum, model.rank(REQUEST, CANDIDATES), strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-5)


def test_all_are_scored_from_the_first_token_that_one_joins(model):
    """As where the space belongs to the candidates: not "b" given the space against "the" with it."""
    found = model.rank({"prompt": "x "}, ["the", "b"])
    assert len({each.token_ids[0] for each in found}) == 2
    expected = model.rank({"prompt": "x"}, [" the", " b"])
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [each.log_likelihood for each in found] == pytest.approx([each.log_likelihood for each in expected])
    assert found[0].text == "the"


def test_the_prompt_and_its_images_run_once(model, monkeypatch):
    rows, tiles = [], []
    tower, decoder = type(model.vision_tower), type(model.decoder)
    run, look = decoder.forward, tower.forward
    monkeypatch.setattr(decoder, "forward", lambda self, x, *rest: rows.append(len(x)) or run(self, x, *rest))
    monkeypatch.setattr(
        tower, "forward", lambda self, x, *rest, **more: tiles.append(1) or look(self, x, *rest, **more)
    )
    found = model.rank(REQUEST, CANDIDATES)
    prompt = model.prepare([REQUEST]).plan.rows
    inputs = {tuple(each.token_ids[:-1]) for each in found}
    assert rows == [prompt, sum(map(len, inputs))]
    model.rank(REQUEST, ["a", "h"])
    assert rows[2:] == [prompt]  # single tokens need no row of their own
    assert tiles == [1, 1]


def test_what_greedy_decoding_says_is_greedy(model):
    letters = [chr(code) for code in range(33, 127) if chr(code) != "<"]
    seen = 0
    for number in range(12):
        request = {"prompt": f"<image>hello {number}:", "images": [tiny.picture(40 + number, 50)]}
        said = model.generate([request], max_new_tokens=1, ignore_eos=True)[0].token_ids
        greedy = [each.token_ids for each in model.rank(request, letters) if each.is_greedy]
        assert greedy == ([said] if model.tokenizer.decode(said) in letters else [])
        seen += bool(greedy)
    assert seen > 1


@pytest.mark.parametrize("template", ["vicuna_v1", "qwen", "plain", "blip2", "mistral", "llava_llama_3"])
def test_answers_to_messages(template, model):
    """With the end of the turn: the loss that training has. Without: that of its tokens before the end."""
    held = model.processor
    model.processor = replace(held, template=builtin_template(template))
    try:
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
        if template != "plain":
            asked = [*asked, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "and?"}]
        request = {"messages": asked, "images": REQUEST["images"][:1]}
        with_end = score_candidates(model, [request], [["the </a"]], end_of_turn=True)[0][0]
        without = score_candidates(model, [request], [["the </a"]])[0][0]
        ending = with_end.token_ids[len(without.token_ids) :]
        assert with_end.token_ids[: len(without.token_ids)] == without.token_ids
        assert model.tokenizer.decode(without.token_ids).strip() == "the </a"
        assert model.tokenizer.decode(ending).strip() in ("</s>", "<|im_end|>", "<|eot_id|>", "")
        assert ending
        taught = {**request, "messages": [*asked[-1:], {"role": "assistant", "content": "the </a"}]}
        if template == "plain":
            with torch.no_grad():
                loss = model(model.prepare([taught], labels=True)).loss.item()
            assert with_end.mean_log_likelihood == pytest.approx(-loss, rel=1e-4)
        assert with_end.log_likelihood < without.log_likelihood
    finally:
        model.processor = held


def test_what_cannot_be_ranked(model):
    messages = [{"role": "user", "content": "what?"}]
    answered = [*messages, {"role": "assistant", "content": "this"}]
    for request, candidates, problem in (
        ({"messages": messages}, ["a", " "], "request 0: candidate 1 is empty"),
        ({"messages": messages, "id": "q"}, [], "request q: candidates are a list of texts"),
        ({"messages": messages}, "hello", "a list of texts"),
        ({"messages": messages}, ["a", 3], "candidate 1 is no text but int"),
        ({"messages": answered}, ["a"], "end with the user's turn"),
        ({"messages": messages}, ["b", "a <image>"], "candidate 1, 'a <image>': .*placeholder"),
        ({"prompt": "what?"}, ["a <image>"], "placeholder"),
        ({"prompt": 3}, ["a"], '"prompt" must be a string'),
        ({}, ["a"], "exactly one of"),
    ):
        with pytest.raises(RequestError, match=problem):
            model.rank(request, candidates)
    with pytest.raises(RequestError, match="has no end of turn"):
        model.rank({"prompt": "what?"}, ["a"], end_of_turn=True)
    with pytest.raises(PromptTooLongError):
        model.rank({"prompt": "what?"}, ["a", "a " * 5000])
    with pytest.raises(ValueError, match="by is 'size'"):
        model.rank({"prompt": "what?"}, ["a"], by="size")


def test_logits_that_are_no_numbers(model, monkeypatch):
    logits = type(model.decoder).logits
    monkeypatch.setattr(type(model.decoder), "logits", lambda self, hidden: logits(self, hidden) * torch.nan)
    with pytest.raises(GenerationError, match="not numbers"):
        model.rank({"prompt": "what?"}, ["a"])
