"""The whole path under each verdict in turn: answers, logits, loss and gradients are the reference backend's."""

import pytest
import torch

from llava_fast.ops import backend, use_backend
from llava_fast.ops.selection.store import Table
from llava_fast.ops.selection.verdict import Verdict
from tests.support import tiny

QUESTION = {"role": "user", "content": "<image>\nhello"}
ASKED = {"messages": [QUESTION], "images": [tiny.picture(20, 30)]}
ANSWERED = ASKED | {"messages": [QUESTION, {"role": "assistant", "content": "the end"}]}


def path(model) -> tuple[torch.Tensor, list[int], torch.Tensor, dict[str, torch.Tensor]]:
    """(supervised rows' logits, greedy tokens, loss, gradients by parameter)."""
    (answer,) = model.generate([ASKED], max_new_tokens=2, ignore_eos=True)
    model.zero_grad()
    out = model(model.prepare([ANSWERED], labels=True, layout="packed"), logits="supervised")
    out.loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return out.logits.detach(), answer.token_ids, out.loss.detach(), gradients


@pytest.mark.parametrize("form", ["reference", "native", "cublas", "triton"])
def test_each_verdict_gives_the_references_results(select, monkeypatch, form):
    """On the CPU Triton's form runs in its interpreter."""
    model = tiny.pair("llava15").ours
    with use_backend("reference"):
        logits, tokens, loss, gradients = path(model)
    ops = [op for op, has in backend.served().items() if form in has]
    select().pinned = Table(verdicts=dict.fromkeys(ops, Verdict(backend=form)))
    ran: set[tuple[str, str]] = set()
    choose = backend.choose
    monkeypatch.setattr(backend, "choose", lambda op, *given: ran.add((op, found := choose(op, *given))) or found)
    mine = path(model)
    assert {op for op, found in ran if found == form} >= set(EXPECTED[form])
    assert (mine[0] - logits).abs().max() <= 1e-4 * logits.abs().max()
    assert mine[1] == tokens
    assert abs(mine[2] - loss) <= 1e-5 * loss
    assert mine[3].keys() == gradients.keys()
    floor = 1e-6 * max(each.abs().max() for each in gradients.values())
    for name, each in gradients.items():
        assert (mine[3][name] - each).abs().max() <= 1e-4 * each.abs().max() + floor, name


EXPECTED = {
    "reference": ("patch_embed", "token_pack", "decoder_step"),
    "native": ("token_pack", "decoder_step"),
    "cublas": ("linear_act", "assemble_inputs"),
    "triton": ("patch_embed", "layer_norm", "linear_act", "assemble_inputs", "rms_norm", "rope", "swiglu"),
}
