"""The loss and every parameter's gradient against transformers', whichever layout a batch has."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llava_fast.families import family_of_config
from tests.support import tiny
from tests.support.parity import assert_close, forget_rope

_TEXT_PARTS = [
    f"{module}.{leaf}"
    for module in ("intermediate.dense", "output.dense", "output.LayerNorm")
    for leaf in ("weight", "bias")
]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def samples(name: str) -> list[dict]:
    """Conversations with one image, several, none, and a video where the kind has them."""
    first, second, third = tiny.picture(60, 90), tiny.picture(1, 300), tiny.picture(90, 30)
    turns = [user("<image> what?"), assistant("the hello"), user("and?"), assistant("a")]
    encodes = tiny.pair(name).ours.config.decoder.answer_start is not None
    made = [
        {"messages": turns[:2] if encodes else turns, "images": [first]},
        {"messages": [user("text alone, somewhat longer than the others"), assistant("yes")]},
        {"messages": [user("<image><image> or?"), assistant("No, the second.")], "images": [second, third]},
    ]
    if tiny.CASES[name].kind in tiny.WITH_VIDEOS:
        frames = np.stack([tiny.picture(50, 80, seed) for seed in range(2)])
        made.append({"messages": [user("<video> moves?"), assistant("It does.")], "video": frames})
    return made


def reference_gradients(pair, requests: list[dict], plan) -> tuple[float, dict]:
    """transformers' loss over the batch and its gradients by our names, one sample after another."""
    pair.hf.zero_grad()
    count = len(plan.column("supervised_row"))
    total, starts = 0.0, plan.column("boundaries")
    for number, request in enumerate(requests):
        messages = request["messages"][: -1 if plan.encoded else None]
        prompt = pair.ours.processor.template.render(messages, add_generation_prompt=bool(plan.encoded))
        question = request["messages"][0]["content"].replace("<image>", "").replace("<video>", "").strip()
        inputs = pair.reference_inputs(prompt, request.get("images", ()), request.get("video"), question)
        window = slice(int(starts[number]), int(starts[number]) + plan.lengths[number])
        labels = torch.from_numpy(plan.column("label")[window].astype(np.int64))[None]
        forget_rope(pair.hf)
        if plan.encoded:
            answer = labels[:, plan.encoded[number] + 1 :]
            inputs["decoder_input_ids"] = torch.cat([inputs["decoder_input_ids"], answer[:, :-1]], 1)
            loss = F.cross_entropy(pair.hf(**inputs).logits[0], answer[0], reduction="sum") / count
        else:
            loss = pair.hf(**inputs, labels=labels, num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    from_stored = family_of_config(pair.ours.config).names.from_stored
    gradients = {from_stored(name): p.grad for name, p in pair.hf.named_parameters()}
    return total, gradients


def assert_same_gradients(what: str, model, expected: dict) -> None:
    """Relative to each tensor's largest. One below 1e-6 of the model's largest is rounding about a true 0 (CLIP's
    k_proj.bias: a shift of all keys changes no attention; what a Q-Former's last layer makes of text is not read), so
    both need only lie below that. None matches None."""
    last = f"encoder.layer.{getattr(model.config.projector, 'num_layers', 0) - 1}."
    zero = "k_proj.bias", "key.bias", *(f"{last}{text}" for text in _TEXT_PARTS)
    floor = 1e-6 * max(g.abs().max().item() for g in expected.values() if g is not None)
    for name, parameter in model.named_parameters():
        found, reference = parameter.grad, expected[name]
        if found is None or reference is None:
            assert found is reference, name
        elif reference.abs().max() < floor:
            assert found.abs().max() < floor, name
            assert name.endswith(zero), name
        else:
            assert_close(what, found, reference)


@pytest.mark.parametrize("name", tiny.CASES)
def test_loss_and_gradients(name):
    pair, requests = tiny.pair(name), samples(name)
    model = pair.ours
    for layout in ("packed", "padded"):
        batch = model.prepare(requests, labels=True, layout=layout)
        if layout == "packed":
            expected_loss, expected = reference_gradients(pair, requests, batch.plan)
        model.zero_grad()
        loss = model(batch).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
        assert_same_gradients(f"gradients, {layout}", model, expected)
    model.zero_grad()
    pair.hf.zero_grad()


def test_gradients_after_generating():
    """Tables that generation cached must not stop training."""
    pair = tiny.pair("next")
    pair.ours.generate(samples("next")[0] | {"messages": [user("<image> what?")]}, max_new_tokens=3)
    test_loss_and_gradients("next")


def test_a_frozen_tower_changes_no_other_gradient():
    pair, requests = tiny.pair("next"), samples("next")
    model = pair.ours
    batch = model.prepare(requests, labels=True)
    _, expected = reference_gradients(pair, requests, batch.plan)
    try:
        model.vision_tower.requires_grad_(False)
        model.zero_grad()
        model(batch).loss.backward()
        frozen = {n: None if n.startswith("vision_tower.") else g for n, g in expected.items()}
        assert_same_gradients("gradients, frozen tower", model, frozen)
    finally:
        model.requires_grad_(True)
        model.zero_grad()
        pair.hf.zero_grad()


@pytest.mark.parametrize("name", ["llava15", "next", "onevision"])
def test_a_text_only_batch_trains_the_decoder_alone(name):
    model = tiny.pair(name).ours
    model.zero_grad()
    batch = model.prepare(samples(name)[1:2], labels=True)
    model(batch).loss.backward()
    for part, parameter in model.named_parameters():
        if part.startswith("decoder."):
            assert parameter.grad is not None, part
            assert parameter.grad.abs().sum() > 0, part
        else:
            assert parameter.grad is None or not parameter.grad.any(), part
    model.zero_grad()


def test_labels_and_logits_together():
    """The choice of logits changes no loss; "supervised" are those the loss is over."""
    model = tiny.pair("next").ours
    batch = model.prepare(samples("next"), labels=True)
    with torch.no_grad():
        outs = {choice: model(batch, logits=choice) for choice in ("supervised", "last", "all")}
    rows = batch.column("supervised_row").long()
    assert len({out.loss.item() for out in outs.values()}) == 1
    assert_close("logits, by choice", outs["supervised"].logits, outs["all"].logits[rows])
    assert_close("logits, by choice", outs["last"].logits, outs["all"].logits[batch.column("last_row").long()])
    target = batch.column("supervised_target").long()
    expected = torch.nn.functional.cross_entropy(outs["supervised"].logits, target)
    assert outs["last"].loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="'last', 'supervised', 'all', 'none', got 'first'"):
        model(batch, logits="first")


@pytest.mark.parametrize("name", ["next", "onevision"])  # its own head, and one tied to the embeddings
def test_the_loss_alone_has_the_same_value_and_gradients(name):
    model = tiny.pair(name).ours
    batch = model.prepare(samples(name), labels=True)
    model.zero_grad()
    loss = model(batch).loss
    loss.backward()
    expected = {part: None if p.grad is None else p.grad.clone() for part, p in model.named_parameters()}
    model.zero_grad()
    alone = model(batch, logits="none")
    alone.loss.backward()
    assert alone.logits is None
    assert alone.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients("gradients, loss alone", model, expected)
    model.zero_grad()
