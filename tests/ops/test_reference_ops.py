"""The ops' references against plain PyTorch, their gradients against finite differences, and their refusals."""

import pytest
import torch
from torch.nn import functional as F

from llava_fast.ops import mix_rows, patch_embed, token_pack, use_backend
from llava_fast.ops.backend import BackendError

MEAN, STD = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])


def by_convolution(tiles, weight, position, bias, class_row):
    """Normalise, convolve, add: as a ViT is written."""
    pixels = (tiles.to(weight.dtype) / 255 - MEAN.to(weight.dtype)[:, None, None]) / STD.to(weight.dtype)[:, None, None]
    rows = F.conv2d(pixels, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    if class_row is not None:
        rows = torch.cat([class_row.expand(len(rows), 1, -1), rows], dim=1)
    return rows + position


@pytest.mark.parametrize("size", [(28, 28), (30, 33), (14, 42)])
@pytest.mark.parametrize("clip", [True, False])
def test_patch_embed_is_the_normalised_convolution(size, clip):
    """Pixels beyond the last whole patch are left out, as by a convolution."""
    height, width = size
    rows = (height // 14) * (width // 14) + clip
    weight, position = torch.randn(24, 3, 14, 14), torch.randn(rows, 24)
    bias, class_row = (None, torch.randn(24)) if clip else (torch.randn(24), None)
    tiles = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8)
    options = {"mean": MEAN, "std": STD, "bias": bias, "class_row": class_row}
    expected = by_convolution(tiles, weight, position, bias, class_row)
    torch.testing.assert_close(patch_embed(tiles, weight, position, **options), expected, rtol=1e-4, atol=1e-4)
    normalised = (tiles / 255 - MEAN[:, None, None]) / STD[:, None, None]
    torch.testing.assert_close(patch_embed(normalised, weight, position, **options), expected, rtol=1e-4, atol=1e-4)


def test_patch_embed_in_bfloat16_is_as_exact_as_the_convolution():
    weight, position, class_row = torch.randn(64, 3, 14, 14) * 0.05, torch.randn(5, 64), torch.randn(64)
    tiles = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    tiles[1] = 0
    tiles[2] = 255
    tiles[3] = torch.tensor([122, 117, 104], dtype=torch.uint8)[:, None, None]
    exact = by_convolution(tiles, weight.double(), position.double(), None, class_row.double())
    halves = [t.bfloat16() for t in (weight, position, class_row)]
    ours = patch_embed(tiles, halves[0], halves[1], mean=MEAN, std=STD, class_row=halves[2])
    plain = by_convolution(tiles, halves[0], halves[1], None, halves[2])
    ours_error, plain_error = ((found.double() - exact).square().mean().sqrt() for found in (ours, plain))
    assert ours.dtype == torch.bfloat16 and ours_error <= 2 * plain_error


def test_patch_embed_gradients():
    tiles = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    double = {"dtype": torch.float64, "requires_grad": True}
    weight, position = torch.randn(5, 3, 4, 4, **double), torch.randn(5, 5, **double)
    class_row = torch.randn(5, **double)

    def run(weight, position, class_row):
        return patch_embed(tiles, weight, position, mean=MEAN, std=STD, class_row=class_row)

    assert torch.autograd.gradcheck(run, (weight, position, class_row))


def test_token_pack_gathers_from_its_tables():
    embedding, visual, constant = torch.randn(6, 4), torch.randn(5, 4), torch.randn(1, 4)
    source = torch.tensor([0, 1, 2, -1, 0, 1, 1], dtype=torch.int32)
    row = torch.tensor([5, 4, 0, -1, 5, 0, 4], dtype=torch.int32)
    tables = {0: embedding, 1: visual, 2: constant}
    places = zip(source.tolist(), row.tolist(), strict=True)
    expected = torch.stack([tables[s][r] if s >= 0 else torch.zeros(4) for s, r in places])
    assert torch.equal(token_pack(source, row, embedding, visual, constant), expected)
    none = torch.zeros(0, dtype=torch.int32)
    assert token_pack(none, none, embedding, visual[:0], constant[:0]).shape == (0, 4)


def test_token_pack_gradients():
    source = torch.tensor([0, 1, 2, -1, 0, 2], dtype=torch.int32)
    row = torch.tensor([1, 1, 0, -1, 1, 0], dtype=torch.int32)
    tables = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 2, 1)]
    assert torch.autograd.gradcheck(lambda *t: token_pack(source, row, *t), tables)


def test_mix_rows_sums_and_maxima():
    rows = torch.randn(6, 3)
    index, weight = torch.tensor([[0, 1], [5, 5], [2, 3]], dtype=torch.int32), torch.rand(3, 2)
    picked = rows[index.long()]
    torch.testing.assert_close(mix_rows(rows, index, weight), (picked * weight[..., None]).sum(1))
    assert torch.equal(mix_rows(rows, index, weight, "max"), picked.amax(1))
    assert mix_rows(rows.bfloat16(), index, weight).dtype == torch.bfloat16
    half = mix_rows(rows.bfloat16(), index, weight)
    wide = (rows.bfloat16().float()[index.long()] * weight[..., None]).sum(1).bfloat16()
    assert torch.equal(half, wide)  # summed in float32


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_mix_rows_gradients(reduce):
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    index, weight = torch.tensor([[0, 1, 2], [5, 4, 2]], dtype=torch.int32), torch.rand(2, 3)
    assert torch.autograd.gradcheck(lambda r: mix_rows(r, index, weight, reduce), rows)


def test_arguments_that_do_not_fit_are_refused():
    weight, position = torch.randn(8, 3, 14, 14), torch.randn(4, 8)
    tiles = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    for wrong, match in ((tiles[0], r"\[tiles, 3, H, W\]"), (tiles[:, :2], r"\[tiles, 3"), (tiles.int(), "uint8")):
        with pytest.raises(ValueError, match=match):
            patch_embed(wrong, weight, position, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="position embedding"):
        patch_embed(tiles, weight, torch.randn(5, 8), mean=MEAN, std=STD)
    ids = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="differ in width"):
        token_pack(ids, ids, torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"must both be \[rows\]"):
        token_pack(ids, ids[:1], torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="'sum' or 'max'"):
        mix_rows(torch.zeros(3, 4), ids[None], torch.zeros(1, 2), "mean")
    with pytest.raises(ValueError, match=r"\[mixed, taps\]"):
        mix_rows(torch.zeros(3, 4), ids[None], torch.zeros(1, 3))


def test_a_backend_that_cannot_serve_says_so():
    rows, index, weight = torch.zeros(3, 4), torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, 2)
    with use_backend("reference"):
        mix_rows(rows, index, weight)
    with use_backend("native"), pytest.raises(BackendError, match="'native' does not serve the op 'mix_rows'"):
        mix_rows(rows, index, weight)
    with pytest.raises(BackendError, match="unknown backend"), use_backend("fast"):
        pass
