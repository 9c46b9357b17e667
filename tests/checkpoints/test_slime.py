"""SliME: a checkpoint of the original layout, against its parts put together by hand from transformers' CLIP and Llama
and the original's steps; saved, asked, and what it cannot be."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import llava_fast
from llava_fast.checkpoints.load import load_checkpoint
from llava_fast.errors import CheckpointError, ImageError
from llava_fast.families import family_of_config
from llava_fast.generation.feature_cache import FeatureCache
from llava_fast.generation.prefix_cache import PrefixCache
from llava_fast.generation.prompt import prompt_of
from llava_fast.generation.ranking import score_candidates
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import new_sequence
from llava_fast.models import router
from llava_fast.models.batch import Batch
from tests.support import slimes, tiny
from tests.support.parity import assert_close
from tests.support.tiny_checkpoints import assert_saved_in_its_layout, edit_json

SIZES = [(32, 32), (20, 90), (70, 40), (64, 64)]
FIXTURE = Path(__file__).parents[1] / "fixtures" / "slime_router.safetensors"
TURNS = [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "the hello"}]


@pytest.fixture(scope="module")
def slime(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slime") / "SliME-vicuna"
    parts = slimes.write(folder)
    return folder, llava_fast.load(folder), parts


def requests() -> list[dict]:
    made = [{"prompt": f"hello <image> {h}x{w}:", "images": [tiny.picture(h, w)]} for h, w in SIZES]
    made.append({"prompt": "a <image><image>\nthe b", "images": [tiny.picture(*size) for size in SIZES[1:3]]})
    return [*made, {"prompt": "only text"}]


@torch.no_grad()
def test_logits_singly_and_batched(slime):
    _, model, parts = slime
    expected = [slimes.reference(model, parts, each["prompt"], each.get("images", [])) for each in requests()]
    fewer = []
    for request, logits in zip(requests(), expected, strict=True):
        found = model(model.prepare([request]), logits="all").logits
        fewer.append(model.processor.count(request).all - len(found))
        assert_close("SliME logits", found, logits)
    assert min(fewer) == fewer[-1] == 0
    assert all(left_out > 0 for left_out in fewer[:-1])
    together = model(model.prepare(requests()), logits="all").logits
    for found, logits in zip(together.split([len(each) for each in expected]), expected, strict=True):
        assert_close("SliME logits, packed batch", found, logits)
    padded = model(model.prepare(requests(), layout="padded"), logits="all").logits
    for found, logits in zip(padded, expected, strict=True):
        assert_close("SliME logits, padded batch", found[: len(logits)], logits)


def test_the_original_routers_scores():
    """Stored under the name output.kept."""
    with safe_open(FIXTURE, "pt") as file:
        rows, text, mask, expected = map(file.get_tensor, ("input.rows", "input.text", "input.mask", "output.kept"))
    score = router.scores(rows, torch.zeros(len(rows), dtype=torch.long), text[None], mask[None] > 0)
    assert_close("SliME router", score, expected, 1e-5)
    stays = router.stays(score.numpy(), np.zeros(len(rows), int), router.RouterConfig(0.95))
    assert stays.nonzero()[0].tolist() == slimes.kept(rows, text[mask > 0], 0.95, 1.0).tolist()
    assert 0 < stays.sum() < len(rows)


def test_images_of_a_batch_are_routed_apart():
    torch.manual_seed(0)
    rows, text = torch.randn(30, 8), torch.randn(2, 5, 8)
    image = torch.tensor([0] * 12 + [3] * 18)
    is_text = torch.arange(5) < torch.tensor([[5], [3]])
    every = router.scores(rows, torch.tensor([0] * 12 + [1] * 18), text, is_text)
    rule = router.RouterConfig(0.7, 0.5)
    stays = router.stays(every.numpy(), image.numpy(), rule)
    for chosen, words in ((slice(0, 12), text[0]), (slice(12, 30), text[1, :3])):
        expected = slimes.kept(rows[chosen], words, 0.7, 0.5)
        assert stays[chosen].nonzero()[0].tolist() == expected.tolist()


def test_answers_alone_are_those_of_a_batch(slime):
    _, model, parts = slime
    together = model.generate(requests(), max_new_tokens=8, ignore_eos=True)
    for request, answer in zip(requests(), together, strict=True):
        (alone,) = model.generate([request], max_new_tokens=8, ignore_eos=True)
        assert alone == answer
        with torch.no_grad():
            given = request["prompt"], request.get("images", []), None, answer.token_ids[:-1]
            logits = slimes.reference(model, parts, *given)
        assert answer.token_ids == logits[-8:].argmax(-1).tolist()
        assert answer.usage.prompt_tokens == len(logits) - 7
    assert "".join(model.stream(requests()[1], max_new_tokens=8, ignore_eos=True)) == together[1].text


@pytest.mark.parametrize("features", [False, True])
def test_rows_are_reused_with_the_same_text_alone(slime, monkeypatch, features):
    _, model, _ = slime
    runner = Runner(model, features=FeatureCache(1 << 20) if features else None)
    scheduler = Scheduler(runner, PrefixCache(runner.cache))
    runs = []
    routed = model.routed
    monkeypatch.setattr(model, "routed", lambda batch: runs.append(batch.plan.rows) or routed(batch))

    def answers(*prompts):
        asked = [{"prompt": prompt, "images": [tiny.picture(70, 40)]} for prompt in prompts]
        sampling = Sampling(max_new_tokens=5, ignore_eos=True)
        made = [new_sequence(model, prompt_of(model.processor, each), sampling) for each in asked]
        for each in made:
            scheduler.add(each)
        while not scheduler.is_idle:
            scheduler.step()
        return [each.result().token_ids for each in made], [each.reused_rows for each in made]

    prompts = ["hello <image> b:", "hello <image> the a a:"]
    alone = [answers_alone(model, prompt) for prompt in prompts]
    runs.clear()
    assert answers(*prompts)[0] == alone
    assert len(runs) == 2
    again, reused = answers(*prompts, prompts[0])
    assert again == [*alone, alone[0]]
    assert len(runs) == 2  # the router's choice is remembered, and the rows are cached
    assert min(reused) > 20


def answers_alone(model, prompt):
    request = {"prompt": prompt, "images": [tiny.picture(70, 40)]}
    return model.generate([request], max_new_tokens=5, ignore_eos=True)[0].token_ids


@torch.no_grad()
def test_candidates_follow_the_routed_prompt(slime):
    _, model, parts = slime
    picture, candidates = tiny.picture(70, 40), ["a", "hello the b"]
    (found,) = score_candidates(model, [{"prompt": "hello <image> b:", "images": [picture]}], [candidates])
    for candidate in found:
        ids = candidate.token_ids
        logits = slimes.reference(model, parts, "hello <image> b:", [picture], None, ids)
        scores = logits[-len(ids) - 1 : -1].log_softmax(-1)[range(len(ids)), ids]
        assert candidate.prompt_tokens == len(logits) - len(ids)
        np.testing.assert_allclose(candidate.log_likelihood, scores.sum().item(), rtol=1e-4)


def test_a_prompt_that_cannot_be_routed_fails_alone(slime, monkeypatch):
    _, model, _ = slime
    scheduler = Scheduler(Runner(model))
    sampling = Sampling(max_new_tokens=3, ignore_eos=True)
    made = [new_sequence(model, prompt_of(model.processor, each), sampling) for each in (requests()[0], requests()[-1])]
    monkeypatch.setattr(model, "routed", lambda _: 1 / 0)
    for each in made:
        scheduler.add(each)
    while not scheduler.is_idle:
        scheduler.step()
    with pytest.raises(ZeroDivisionError):
        made[0].result()
    assert len(made[1].result().token_ids) == 3


def test_few_waiting_prompts_are_routed_in_one_step(slime, monkeypatch):
    """Their rows are held on the device until their prefill."""
    _, model, _ = slime
    scheduler = Scheduler(Runner(model), chunk_rows=32)
    asked = [{"prompt": f"hello <image> {'the ' * n}:", "images": [tiny.picture(70, 40)]} for n in range(8)]
    sampling = Sampling(max_new_tokens=3, ignore_eos=True)
    made = [new_sequence(model, prompt_of(model.processor, each), sampling) for each in asked]
    runs, held, routed = [], [], model.routed
    monkeypatch.setattr(model, "routed", lambda batch: runs.append(1) or routed(batch))
    for each in made:
        scheduler.add(each)
    while not scheduler.is_idle:
        before = len(runs)
        scheduler.step()
        held.append(len(runs) - before)
    assert max(held) == 2  # the first has less than 32 rows
    monkeypatch.undo()
    for each, request in zip(made, asked, strict=True):
        assert each.result() == model.generate([request], max_new_tokens=3, ignore_eos=True)[0]


def test_an_answer_may_have_the_rows_that_are_left_out(slime):
    _, model, _ = slime
    request = {"prompt": "hello <image> b:", "images": [tiny.picture(70, 40)]}
    most = model.config.decoder.context_length
    request["prompt"] += " a" * (most - 3 - model.processor.count(request).all)
    asked = model.processor.count(request).all
    (answer,) = model.generate([request], max_new_tokens=12, ignore_eos=True)
    assert asked + 12 > most
    assert answer.usage.prompt_tokens + 12 <= most
    assert len(answer.token_ids) == 12


def test_a_conversation_routes_its_image_again_for_each_question(slime):
    _, model, _ = slime
    picture = tiny.picture(70, 40)
    chat = model.chat()
    for question in ("what is it?", "hello the b?"):
        history = list(chat.messages)
        answer = chat.send(question, images=[] if history else [picture], max_new_tokens=4)
        (whole,) = model.generate([{"messages": chat.messages[:-1], "images": [picture]}], max_new_tokens=4)
        assert whole == answer


def gradients(model, parts, names):
    expected = {names.from_stored(name): each.grad for name, each in parts.llama.named_parameters()}
    expected |= {f"vision_tower.{k.removeprefix('vision_model.')}": p.grad for k, p in parts.clip.named_parameters()}
    return expected | {names.from_stored(f"model.{name}"): each.grad for name, each in parts.weights.items()}


@pytest.mark.parametrize("router_text", ["prompt", "all"])
def test_gradients(slime, router_text):
    """The router reads the question, or by name the answer too; no gradient passes through its choice."""
    _, model, parts = slime
    request = {"messages": TURNS, "images": [tiny.picture(20, 90)]}
    processor = dataclasses.replace(model.processor, router_text=router_text)
    prepared = processor.prepare([request], labels=True)
    batch = Batch.from_prepared(prepared)
    model.zero_grad()
    out = model(batch)
    out.loss.backward()
    prompt = processor.template.render(TURNS, add_generation_prompt=False)
    of_text = processor.outline(request, labels=True)
    marks = np.concatenate([piece.supervised for piece in of_text if hasattr(piece, "supervised")])
    unread = torch.from_numpy(marks if router_text == "prompt" else np.zeros_like(marks))
    logits = slimes.reference(model, parts, prompt, request["images"], unread)
    rows = np.flatnonzero(marks)[::-1].copy() - len(marks)  # counted from the end: all answers follow the image
    for module in (parts.clip, parts.llama):
        module.zero_grad()
    for weight in parts.weights.values():
        weight.grad = None
    target = batch.column("supervised_target").long()
    torch.nn.functional.cross_entropy(logits[rows[::-1].copy() - 1], target).backward()
    expected = gradients(model, parts, family_of_config(model.config).names)
    floor = 1e-6 * max(grad.abs().max() for grad in expected.values() if grad is not None)
    for name, parameter in model.named_parameters():
        if expected[name] is None or parameter.grad is None:
            assert expected[name] is parameter.grad, name
        elif expected[name].abs().max() >= floor:
            assert_close("SliME gradients", parameter.grad, expected[name])
    assert model.projector.compressor.query.grad is not None
    model.zero_grad()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mm_learnable_gated": 0, "use_global_only": True},
        {"mm_learnable_gated": 1, "use_global_only": True, "mm_patch_merge_type": "flat"},
        {"use_local_only": True, "mm_resampler_topp": 1.0},
    ],
    ids=["both experts", "first expert", "second expert", "tiles alone"],
)
def test_the_experts_of_an_overview_of_576_rows(tmp_path, changes):
    """And the stages of training: each field of config.json is obeyed."""
    parts = slimes.write(tmp_path, patch=2, **changes)
    model = llava_fast.load(tmp_path)
    request = {"prompt": "hello <image> b", "images": [tiny.picture(30, 70)]}
    batch = model.prepare([request])
    logits = slimes.reference(model, parts, request["prompt"], request["images"])
    out = model(batch, logits="all").logits
    assert_close("SliME logits", out, logits)
    out.square().mean().backward()
    logits.square().mean().backward()
    expected = gradients(model, parts, family_of_config(model.config).names)
    floor = 1e-6 * max(grad.abs().max() for grad in expected.values() if grad is not None)
    unused = {id(parameter) for parameter in model.projector.unused()}
    for name, parameter in model.projector.named_parameters(prefix="projector"):
        grad = expected[name]
        if grad is None or grad.abs().max() == 0:
            assert parameter.grad is None or parameter.grad.abs().max() == 0, name
            assert id(parameter) in unused, name
        elif grad.abs().max() >= floor:
            assert_close("SliME gradients", parameter.grad, grad)
            assert id(parameter) not in unused, name


def test_in_training_the_gate_and_the_router_are_noisy(slime, tmp_path):
    _, model, _ = slime
    batch = model.prepare([{"prompt": "hello <image> b", "images": [tiny.picture(70, 90)]}])
    try:
        model.train()
        torch.manual_seed(0)
        chosen = {tuple(model.routed(batch).batch.plan.column("kept").tolist()) for _ in range(8)}
    finally:
        model.eval()
    assert len(chosen) > 1
    rows = torch.randn(6, slimes.HIDDEN)
    model.projector.train()
    assert not torch.equal(model.projector._weights(rows), model.projector._weights(rows))
    model.projector.eval()
    assert torch.equal(model.projector._weights(rows), model.projector._weights(rows))


def test_saved_it_is_the_same_to_the_bit(slime, tmp_path):
    folder, model, _ = slime
    assert_saved_in_its_layout("slime", model, folder, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer'; supported are cosine"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'; supported are flat, spat"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio is 'pad'; supported are anyres"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_resampler_dim": 5}, "mm_resampler_dim is 5, which is not a square"),
        ({"mm_resampler_topp": 1.5}, "mm_resampler_topp"),
        ({"use_global_only": True, "use_local_only": True}, "are both true"),
    ],
)
def test_what_it_cannot_be_is_refused(slime, tmp_path, change, said):
    shutil.copytree(slime[0], tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", **change)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "copy")


def test_a_separator_outside_of_the_vocabulary_is_refused(slime, tmp_path):
    shutil.copytree(slime[0], tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", seperator=5000)
    with pytest.raises(CheckpointError, match=r"separator token of a SliME .* is 5000"):
        llava_fast.load(tmp_path / "copy")


def test_videos_are_refused(slime):
    frames = np.stack([tiny.picture(30, 30)] * 2)
    with pytest.raises(ImageError, match="videos are not supported for this kind of checkpoint"):
        slime[1].prepare([{"prompt": "<video>", "video": frames}])
