"""patch_embed: every backend against the normalised convolution and the reference in float64, gradients, contracts."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.pictures.view import View
from llava_fast.ops import patch_embed, triton_support, use_backend
from llava_fast.ops.backend import BackendError
from tests.support.kernel_checks import DEVICE, DTYPES, check_op, relative

BACKENDS = ("reference", "triton")
MEAN, STD = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])


GEMM = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4}
WEIGHT_GRADIENT = {"PARTS": 3, "BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4}


@pytest.fixture(autouse=True)
def small_blocks():
    """Without a GPU, blocks so small that tiny sizes take several, and the interpreter does not fill large ones."""
    small = {f"patch_embed_kernel{suffix}": GEMM for suffix in ("", "_rows", "_fp32")}
    small |= {f"patch_weight_gradient_kernel{suffix}": WEIGHT_GRADIENT for suffix in ("", "_rows", "_fp32")}
    with triton_support.forced(small if DEVICE == "cpu" else {}):
        yield


def run(tiles, weight, position, bias, class_row, mean, std, count=None):
    return patch_embed(tiles, weight, position, mean=mean, std=std, bias=bias, class_row=class_row, count=count)


def made(tiles=3, size=(28, 28), patch=14, width=24, bias=True, class_row=True, dtype=torch.float32):
    """Arguments of `run` with pixels of every value."""
    rows = (size[0] // patch) * (size[1] // patch) + class_row
    like = {"dtype": dtype, "device": DEVICE}
    return [
        torch.randint(0, 256, (tiles, 3, *size), dtype=torch.uint8, device=DEVICE),
        torch.randn(width, 3, patch, patch, **like) / patch,
        torch.randn(rows, width, **like),
        torch.randn(width, **like) if bias else None,
        torch.randn(width, **like) if class_row else None,
        MEAN.to(DEVICE),
        STD.to(DEVICE),
    ]


def as_patch_rows(tiles, patch):
    """Planar tiles as the image op's patch rows, the padding filled with what must not matter."""
    _count, _, height, width = tiles.shape
    whole = tiles[:, :, : height // patch * patch, : width // patch * patch]
    rows = whole.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return F.pad(rows, (0, -rows.shape[2] % 16), value=77)


def by_convolution(tiles, weight, position, bias, class_row):
    """Normalise, convolve, add: as a ViT is written."""
    mean, std = (v.to(weight)[:, None, None] for v in (MEAN, STD))
    rows = F.conv2d((tiles.to(weight.dtype) / 255 - mean) / std, weight, bias, stride=weight.shape[-1])
    rows = rows.flatten(2).transpose(1, 2)
    if class_row is not None:
        rows = torch.cat([class_row.expand(len(rows), 1, -1), rows], dim=1)
    return rows + position


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(28, 28), (30, 33), (14, 42)])
@pytest.mark.parametrize("clip", [True, False])
def test_it_is_the_normalised_convolution(backend, size, clip):
    """Pixels beyond the last whole patch are left out, as by a convolution."""
    args = made(size=size, bias=not clip, class_row=clip)
    expected = by_convolution(args[0], *(None if a is None else a.double() for a in args[1:5])).float()
    with use_backend(backend):
        torch.testing.assert_close(run(*args), expected, rtol=1e-4, atol=1e-4)
    args[0] = (args[0] / 255 - args[5][:, None, None]) / args[6][:, None, None]
    torch.testing.assert_close(run(*args), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS if DEVICE == "cuda" else BACKENDS[:1])
def test_in_bfloat16_it_is_as_exact_as_the_convolution(backend):
    args = made(tiles=4, width=64, bias=False)
    args[0][1] = 0
    args[0][2] = 255
    args[0][3] = torch.tensor([122, 117, 104], dtype=torch.uint8, device=DEVICE)[:, None, None]
    exact = by_convolution(args[0], *(None if a is None else a.double() for a in args[1:5]))
    args[1:5] = [None if a is None else a.bfloat16() for a in args[1:5]]
    with use_backend(backend):
        ours = run(*args)
    assert ours.dtype == torch.bfloat16
    assert relative(ours, exact) <= 2 * relative(by_convolution(*args[:5]), exact)


@pytest.mark.parametrize("trained", [[], [1], [2], [3], [4], [1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_gradients(backend, dtype, trained, poisoned):
    check_op(run, made(dtype=dtype), trained, backend)


@pytest.mark.parametrize("form", ["planar", "patch rows"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [
        {"tiles": 0},
        {"tiles": 1, "size": (14, 14), "bias": False},
        {"tiles": 3, "size": (16, 40), "patch": 16, "class_row": False},
        {"tiles": 2, "size": (31, 20), "patch": 7, "width": 31},
        {"tiles": 2, "size": (3, 5), "patch": 1, "width": 1, "class_row": False, "bias": False},
        {"tiles": 5, "size": (23, 34), "patch": 11, "width": 70},
    ],
    ids=str,
)
def test_ragged_shapes(backend, shape, form, poisoned):
    args = made(**shape)
    if form == "patch rows":
        args[0] = as_patch_rows(args[0], shape.get("patch", 14))
    check_op(run, args, [i for i in (1, 2, 3, 4) if args[i] is not None], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_577_rows_of_clip(backend, poisoned):
    """24 x 24 patches and a class row, as CLIP's 336-pixel tower has: no block of rows ends where a tile does."""
    args = made(tiles=2, size=(336, 336), width=5)
    assert len(args[2]) == 577
    large = {"patch_embed_kernel_fp32": {**GEMM, "BLOCK_M": 128}}  # for the interpreter's sake
    large |= {"patch_weight_gradient_kernel_fp32": {**WEIGHT_GRADIENT, "BLOCK_K": 128}}
    with triton_support.forced(large if DEVICE == "cpu" else {}):
        check_op(run, args, [1, 2, 3, 4], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_patch_rows_of_the_image_reader(backend):
    image = np.random.randint(0, 256, (50, 40, 3), dtype=np.uint8)
    views = [View(size=(28, 30), offset=(0, -1), canvas=(30, 60))]
    args = made(tiles=2, size=(30, 30))
    planar, rows = (
        torch.from_numpy(make_tiles(image, views, 30, tile_format=tile_format, patch_size=14)).to(DEVICE)
        for tile_format in ("planar", "patch_rows")
    )
    with use_backend(backend):
        torch.testing.assert_close(run(planar, *args[1:]), run(rows, *args[1:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_handled(backend, poisoned):
    args = made(tiles=4)
    args[0] = args[0].transpose(2, 3)[1:]
    args[1] = args[1].transpose(2, 3)
    args[2] = args[2].T.contiguous().T
    check_op(run, args, [1, 2, 3, 4], backend)


@pytest.mark.parametrize("form", ["planar", "patch rows", "float"])
@pytest.mark.parametrize("count", [0, 1, 3, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_after_the_count_are_zeros_and_get_nothing(backend, count, form, poisoned):
    """5 rows per tile, 32 a block: blocks with all, some and none of their tiles; some width beyond a block."""
    args = [*made(tiles=15, width=40), None]
    if form == "patch rows":
        args[0] = as_patch_rows(args[0], 14)
    if form == "float":
        backend, args[0] = "reference", torch.randn(15, 3, 28, 28, device=DEVICE)
        args[0][3 * count :] = torch.nan
    weights = [a.requires_grad_() for a in args[1:5]]
    grad = torch.randn(15, 5, 40, device=DEVICE)
    with use_backend(backend):
        few = run(args[0][: 3 * count], *args[1:])
        expected = torch.autograd.grad(few, weights, grad[: 3 * count])
        args[7] = torch.tensor([3 * count], dtype=torch.int32, device=DEVICE)
        found = run(*args)
        gradients = torch.autograd.grad(found, weights, grad)
    torch.testing.assert_close(found[: 3 * count], few, rtol=1e-5, atol=1e-5)
    assert not found[3 * count :].any()
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_float_tiles_take_a_gradient():
    args = made(size=(30, 33), dtype=torch.float64)
    args[0] = torch.randn(3, 3, 30, 33, dtype=torch.float64, device=DEVICE)
    expected_args = [a.detach().clone().requires_grad_() for a in args[:5]]
    pixels = expected_args[0] * STD.to(DEVICE)[:, None, None] + MEAN.to(DEVICE)[:, None, None]
    by_convolution(pixels * 255, *expected_args[1:]).square().sum().backward()
    for trained in ([0], [0, 1, 2, 3, 4]):
        mine = [a.detach().clone().requires_grad_(i in trained) for i, a in enumerate(args[:5])]
        run(*mine, *args[5:]).square().sum().backward()
        for i, expected in enumerate(expected_args):
            assert relative(mine[i].grad, expected.grad) < 1e-6 if i in trained else mine[i].grad is None


def test_gradients_by_finite_differences():
    args = made(tiles=2, size=(8, 8), patch=4, width=5, dtype=torch.float64)
    weights = [a.requires_grad_() for a in args[1:5]]
    assert torch.autograd.gradcheck(lambda *w: run(args[0], *w, *args[5:]), weights)


def test_the_order_of_sums_is_fixed():
    args = made(tiles=60, size=(8, 8), patch=4, width=16)
    weights = [a.requires_grad_() for a in args[1:5]]
    with use_backend("triton"):
        first, second = (torch.autograd.grad(run(args[0], *weights, *args[5:]).square().sum(), weights) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("counted", [True, False])
def test_torch_library_contract(backend, clip, counted):
    count = torch.tensor([1], dtype=torch.int32, device=DEVICE) if counted else None
    args = [*made(tiles=2, size=(8, 8), patch=4, width=8, bias=not clip, class_row=clip), count]
    weights = [a.requires_grad_() for a in args[1:5] if a is not None]
    tiles, weight, position, bias, class_row, mean, std, _ = args
    with use_backend(backend):
        torch.library.opcheck(
            torch.ops.llava_fast.patch_embed.default, (tiles, weight, position, mean, std, bias, class_row, count)
        )
        out = torch.compile(run, fullgraph=True, backend="aot_eager")(*args)
        found = torch.autograd.grad(out.square().sum(), weights)
        expected = torch.autograd.grad(run(*args).square().sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backwards_contract(backend):
    tiles, weight, position, _, _, mean, std = made(tiles=2, size=(9, 8), patch=4, width=8)
    grad = torch.randn(2, *position.shape, device=DEVICE)
    backward, shape = torch.ops.llava_fast.patch_embed_backward.default, list(tiles.shape)
    checks = ("test_schema", "test_faketensor")
    with use_backend(backend):
        for wanted in ([1, 2, 3, 4], [1], [2], [3], [4]):  # weight, position, bias, class row
            needed = [i in wanted for i in range(5)]
            given = (grad, tiles if needed[1] else None, None, mean, std, shape, 4, 1, needed)
            torch.library.opcheck(backward, given, test_utils=checks)
    needed = [True, False, False, False, False]  # float tiles
    torch.library.opcheck(backward, (grad, None, weight, mean, std, shape, 4, 1, needed), test_utils=checks)


def test_nothing_is_saved_for_what_is_frozen():
    args = made()
    args[2].requires_grad_()
    out = run(*args)
    assert all(saved is None or saved.numel() == 3 for saved in out.grad_fn.saved_tensors)


def test_what_does_not_fit_is_refused():
    tiles, weight, position, bias, class_row, mean, std = made()
    rest = (position, bias, class_row, mean, std)
    for wrong, match in (
        (tiles[0].float(), r"\[tiles, 3, H, W\]"),
        (tiles[:, :2], r"\[tiles, 3"),
        (tiles.int(), "uint8"),
        (tiles[:, 0, :, :16], "patch rows must hold the 588 bytes"),
    ):
        with pytest.raises(ValueError, match=match):
            run(wrong, weight, *rest)
    with pytest.raises(ValueError, match="position embedding is"):
        run(tiles, weight, position[1:], bias, class_row, mean, std)
    with pytest.raises(ValueError, match=r"bias must be \[24\]"):
        run(tiles, weight, position, bias[:3], class_row, mean, std)
    with pytest.raises(ValueError, match=r"weight must be \[width, 3, P, P\]"):
        run(tiles, weight[:, :, 1:], *rest)
    with use_backend("triton"):
        with pytest.raises(BackendError, match="it takes uint8 pixels"):
            run(tiles / 255, weight, *rest)
        with pytest.raises(BackendError, match="dtypes differ"):
            run(tiles, weight.half(), *rest)
