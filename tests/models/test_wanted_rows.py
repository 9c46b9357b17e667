"""Prefill computes what follows the last layer's attention for the rows whose logits are wanted, and for no others."""

from __future__ import annotations

import pytest
import torch

from llava_fast.models.blocks.attention import Spans
from tests.support import tiny

LENGTHS, WANTED = (5, 3, 4), (4, 11)  # the last rows of the first and the last of three sequences


def rows_of_mlps(decoder, monkeypatch) -> list[int]:
    """Records the number of rows of each call of an MLP."""
    counts: list[int] = []
    kind = type(decoder.layers[0].mlp)
    forward = kind.forward

    def counted(self, x):
        counts.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(kind, "forward", counted)
    return counts


@pytest.mark.parametrize("name", ["next", "next_qwen3"])
def test_other_rows_end_before_the_last_mlp(name, monkeypatch):
    decoder = tiny.pair(name).ours.decoder
    counts = rows_of_mlps(decoder, monkeypatch)
    everything, wanted = both(decoder)
    layers = len(decoder.layers)
    assert counts == [sum(LENGTHS)] * (2 * layers - 1) + [len(WANTED)]
    assert torch.allclose(wanted, everything, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["next", "llava_mpt"])
def test_a_hooked_layer_and_a_hosted_decoder_return_the_same_rows(name):
    decoder = tiny.pair(name).ours.decoder
    called: list[int] = []
    hook = decoder.layers[-1].register_forward_hook(lambda *_: called.append(1))
    try:
        everything, wanted = both(decoder)
    finally:
        hook.remove()
    assert called
    assert torch.allclose(wanted, everything, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def both(decoder) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(sum(LENGTHS), decoder.embed_tokens.weight.shape[1])
    position = torch.cat([torch.arange(length) for length in LENGTHS])
    spans = Spans((0, 5, 8), LENGTHS)
    rows = torch.tensor(WANTED)
    return decoder(x, position, spans)[rows], decoder.rows_of(x, position, spans, None, rows)
