"""image_tiles: every backend against the CPU path (which is Pillow's resize to the bit), pixel for pixel."""

import numpy as np
import pytest
import torch

from llava_fast import _C
from llava_fast.inputs.pictures.preprocessing import FILTERS
from llava_fast.inputs.pictures.tiles import TilePlan as HostPlan
from llava_fast.inputs.pictures.tiles import make_tiles, plan_tiles
from llava_fast.inputs.pictures.view import View
from llava_fast.ops import image_tiles, use_backend
from llava_fast.ops.backend import BackendError
from llava_fast.ops.image import TilePlan
from tests.support.kernel_checks import DEVICE

BACKENDS = ("reference", "native") if DEVICE == "cpu" or _C.has_cuda() else ("reference",)
PILLOW = ("12.1", "12", "13")


def view(size, offset=(0, 0), canvas=(28, 28), square=False, fill=(0, 0, 0), filter="bicubic"):
    return View(size=size, offset=offset, canvas=canvas, square=square, fill=fill, filter=filter)


VIEWS = {
    "squashed": [view((28, 28))],
    "cropped": [view((28, 50), (0, -11))],
    "anyres": [view((28, 28)), view((40, 56), (8, 0), (56, 56))],
    "padded": [view((28, 28), square=True, fill=(122, 116, 104)), view((9, 11), (3, 4), fill=(5, 6, 7))],
    "kept": [view((28, 28)), view((33, 28), (-2, 0))],
    "filters": [view((28, 28), filter=filter) for filter in FILTERS],
}


def noise(*size):
    return np.random.randint(0, 256, (*size, 3), dtype=np.uint8)


def on_device(plan: HostPlan) -> TilePlan:
    return TilePlan(torch.from_numpy(plan.jobs).to(DEVICE), torch.from_numpy(plan.words).to(DEVICE), *plan[2:])


def flat(batch):
    joined = np.concatenate([image.ravel() for image in batch]) if batch else np.zeros(0, np.uint8)
    return torch.from_numpy(joined).to(DEVICE)


def planned(batch, views, pillow=None, patch=0):
    return on_device(plan_tiles([image.shape[:2] for image in batch], views, 28, pillow=pillow, patch_size=patch))


def check(backend, batch, views, pillow=None, patch=0):
    """The whole batch on `backend` is what make_tiles gives for each image."""
    options = {"pillow": pillow} | ({"tile_format": "patch_rows", "patch_size": patch} if patch else {})
    expected = np.concatenate([make_tiles(image, v, 28, **options) for image, v in zip(batch, views, strict=True)])
    with use_backend(backend):
        found = image_tiles(flat(batch), planned(batch, views, pillow, patch))
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("pillow", PILLOW)
@pytest.mark.parametrize("patch", [0, 14, 9, 28])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_all_kinds_of_views(backend, patch, pillow, poisoned):
    """Every kind of view of images of every shape, in one batch; the orders of the two passes are mixed in it."""
    batch = [noise(*size) for size in ((77, 131), (131, 77), (28, 28), (230, 2), (1, 400), (33, 28), (1, 1))]
    check(backend, batch, [[*VIEWS["anyres"], *VIEWS[name]] for name in (*VIEWS, "kept")], pillow, patch)


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (2, 3000), (1500, 7)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_images(backend, size, poisoned):
    for name in ("squashed", "anyres"):
        check(backend, [noise(*size)], [VIEWS[name]])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_sizes_and_views(backend, seed, poisoned):
    rng = np.random.default_rng(seed)
    batch = [noise(*rng.integers(1, 90, 2)) for _ in range(4)]
    views = [
        [
            view(
                tuple(int(v) for v in rng.integers(1, 70, 2)),
                tuple(int(v) for v in rng.integers(-20, 20, 2)),
                tuple(int(28 * v) for v in rng.integers(1, 3, 2)),
                bool(rng.integers(2)),
                tuple(int(v) for v in rng.integers(0, 256, 3)),
                FILTERS[rng.integers(6)],
            )
            for _ in range(rng.integers(1, 4))
        ]
        for _ in batch
    ]
    check(backend, batch, views, PILLOW[seed % 3], (0, 14)[seed % 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_pixels_stay_in_range(backend):
    """Bicubic weights are negative at the sides, so sums run below 0 and above 255 at hard edges."""
    image = noise(90, 90) // 128 * 255
    check(backend, [image], [[view((56, 56), (0, 0), (56, 56)), view((28, 28))]])


@pytest.mark.parametrize("patch", [0, 14])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend, patch):
    with use_backend(backend):
        found = image_tiles(flat([]), planned([], [], patch=patch))
    assert found.shape == ((0, 4, 592) if patch else (0, 3, 28, 28))


@pytest.mark.parametrize("patch", [0, 14])
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_library_contract(backend, patch):
    batch = [noise(40, 30), noise(10, 50)]
    pixels, plan = flat(batch), planned(batch, [VIEWS["anyres"], VIEWS["squashed"]], patch=patch)
    sizes = (plan.tile, plan.patch, plan.tiles, plan.middle_bytes, plan.first_pixels, plan.canvas_pixels, plan.taps)
    with use_backend(backend):
        torch.library.opcheck(torch.ops.llava_fast.image_tiles.default, (pixels, plan.jobs, plan.words, *sizes))
        compiled = torch.compile(image_tiles, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(pixels, plan), image_tiles(pixels, plan))


def test_what_does_not_fit_is_refused():
    batch = [noise(40, 30)]
    pixels, plan = flat(batch), planned(batch, [VIEWS["anyres"]])
    with pytest.raises(ValueError, match="have 3600 bytes, and 3599"):
        image_tiles(pixels[1:], plan)
    with pytest.raises(ValueError, match=r"uint8 \[bytes\]"):
        image_tiles(pixels.view(40, 30, 3), plan)
    with pytest.raises(ValueError, match=r"int32 \[jobs, 28\]"):
        image_tiles(pixels, plan._replace(jobs=plan.jobs.long()))
    with pytest.raises(ValueError, match="the plan is on meta"):
        image_tiles(pixels, plan._replace(jobs=plan.jobs.to("meta")))
    with pytest.raises(ValueError, match="multiple of the tile"):
        plan_tiles([(20, 20)], [[view((20, 20), (0, 0), (28, 30))]], 28)
    with use_backend("triton"), pytest.raises(BackendError, match="'triton' does not serve"):
        image_tiles(pixels, plan)
