"""csrc's CUDA kernels executed on the CPU: a header stands in for the launch (tests/csrc), so blocks and threads are
loops, and every index is computed. What a host cannot show is timing and the device's compiler."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_fast.inputs.pictures.preprocessing import FILTERS
from llava_fast.inputs.pictures.tiles import make_tiles, plan_tiles
from llava_fast.inputs.pictures.view import View
from llava_fast.ops.token_pack import native

ROOT = Path(__file__).parents[2]
TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
PARTS = 64  # kConstantParts
GUARD = 64  # bytes around what a kernel writes
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("cuda") / "on_host.so"
    folders = [f"-I{ROOT / 'tests/csrc/stand_in'}", f"-I{ROOT / 'csrc'}"]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *folders]
    source = str(ROOT / "tests/csrc/on_host.cpp")
    run = subprocess.run(["g++", *flags, source, "-o", str(library)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(params=[False, True], ids=["", "backwards"])
def call(kernels, request):
    """Runs a kernel's host function, with threads in either order; (exit code, launches)."""
    kernels.set_backwards(request.param)

    def run(name, *given):
        before = kernels.count_launches()
        code = getattr(kernels, name)(*(ctypes.c_int64(each) for each in given))
        return code, kernels.count_launches() - before

    return run


class Guarded:
    """Memory for a result, of which nothing beside it may be written; `shift` bytes off a 16-byte boundary."""

    def __init__(self, shape, dtype, shift=0):
        self.size = torch.Size(shape).numel() * dtype.itemsize
        self.memory = np.full(self.size + 2 * GUARD + 16, 0xA5, np.uint8)
        self.start = GUARD + (-(self.memory.ctypes.data + GUARD)) % 16 + shift
        self.address = self.memory.ctypes.data + self.start
        self.shape, self.dtype = shape, dtype

    def result(self) -> torch.Tensor:
        outside = np.concatenate([self.memory[: self.start], self.memory[self.start + self.size :]])
        assert (outside == 0xA5).all()
        inside = self.memory[self.start : self.start + self.size].copy()
        return torch.from_numpy(inside).view(self.dtype).view(self.shape)


def aligned(tensor):
    """The tensor's values at a 16-byte boundary."""
    held = Guarded(tensor.shape, tensor.dtype)
    values = tensor.contiguous().view(torch.uint8).numpy().ravel()
    held.memory[held.start : held.start + held.size] = values
    return held


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(("width", "shift"), [(8, 0), (7, 0), (8, 4), (1, 0), (2100, 0)])
def test_rows_are_packed_and_taken(call, width, shift):
    """In 16-byte words, or bytes where rows or addresses do not allow them."""
    tables = [torch.randn(rows, width) for rows in (50, 20, 1)]
    source = torch.randint(-1, 4, (300,), dtype=torch.int32)  # 3 is padding too
    row = torch.stack([torch.randint(0, len(tables[max(0, min(kind, 2))]), ()) for kind in source.tolist()]).int()
    held = [aligned(each) for each in tables]
    out = Guarded((300, width), torch.float32, shift)
    pointers = [source.data_ptr(), row.data_ptr(), *(each.address for each in held)]
    assert call("pack_rows", *pointers, out.address, 300, width * 4) == (0, 1)
    expected = torch.zeros(300, width)
    for number, (kind, at) in enumerate(zip(source.tolist(), row.tolist(), strict=True)):
        if 0 <= kind < 3:
            expected[number] = tables[kind][at]
    found = out.result()
    assert torch.equal(found, expected)
    place = torch.randint(-2, 300, (75,), dtype=torch.int32)
    taken, grad = Guarded((75, width), torch.float32, shift), aligned(found)
    assert call("take_rows", grad.address, place.data_ptr(), taken.address, 75, width * 4) == (0, 1)
    assert torch.equal(taken.result(), found[place.long().clamp(min=0)] * (place >= 0)[:, None])


@pytest.mark.parametrize("width", [1, 255, 256, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_segments_are_summed(call, dtype, width):
    rows, order = torch.randn(400, width).to(dtype), torch.randperm(400)[:330].int()
    first, target = ints(0, 0, 1, 200, 330), ints(9, 2, 0, 5)
    expected = torch.zeros(10, width)
    for segment, to in enumerate(target.tolist()):
        for use in order[first[segment] : first[segment + 1]].tolist():
            expected[to] += rows[use].float()
    out = torch.zeros(10, width, dtype=dtype)
    pointers = [rows.data_ptr(), order.data_ptr(), first.data_ptr(), target.data_ptr(), out.data_ptr()]
    assert call("sum_segments", *pointers, 4, width, TYPES[dtype], 0) == (0, 1)
    assert torch.equal(out, expected.to(dtype))  # in order, in float32
    # In parts: as the constants' gradients, of few rows that many took.
    out, scratch = Guarded((4, width), dtype), Guarded((4, PARTS, width), torch.float32)
    pointers = [rows.data_ptr(), order.data_ptr(), first.data_ptr(), 0, out.address]
    assert call("sum_segments", *pointers, 4, width, TYPES[dtype], scratch.address) == (0, 2)
    wide = expected[target.long()]
    torch.testing.assert_close(out.result().float(), wide.to(dtype).float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    scratch.result()


def test_what_is_refused_and_what_is_empty(call):
    assert call("sum_segments", 0, 0, 0, 0, 0, 1, 1, TYPES[torch.float64], 0)[0] == 1
    assert call("sum_segments", 0, 0, 0, 0, 0, 0, 4, TYPES[torch.float32], 0) == (0, 0)
    assert call("pack_rows", 0, 0, 0, 0, 0, 0, 0, 8) == (0, 0)
    assert call("take_rows", 0, 0, 0, 0, 8) == (0, 0)
    assert call("take_rows", 0, 0, 0, 1 << 32, 8)[0] == 1  # more blocks than a grid has


def view(size, offset=(0, 0), canvas=(28, 28), square=False, fill=(0, 0, 0), filter="bicubic"):
    return View(size=size, offset=offset, canvas=canvas, square=square, fill=fill, filter=filter)


VIEWS = [
    [view((28, 28), filter=filter) for filter in FILTERS],
    [view((28, 28)), view((40, 56), (8, 0), (56, 56))],
    [view((28, 28), square=True, fill=(122, 116, 104)), view((9, 11), (3, 4), fill=(5, 6, 7))],
    [view((28, 50), (0, -11)), view((33, 28), (-2, 0))],
]


@pytest.mark.parametrize("patch", [0, 14, 9])
def test_tiles(call, patch):
    """A thread a pixel, against make_tiles image by image."""
    batch = [np.random.randint(0, 256, (*size, 3), dtype=np.uint8) for size in ((77, 61), (30, 2), (1, 90), (28, 28))]
    options = {"tile_format": "patch_rows", "patch_size": patch} if patch else {}
    expected = np.concatenate([make_tiles(image, v, 28, **options) for image, v in zip(batch, VIEWS, strict=True)])
    plan = plan_tiles([image.shape[:2] for image in batch], VIEWS, 28, patch_size=patch)
    jobs, words, pixels = plan.jobs, plan.words, np.concatenate([image.ravel() for image in batch])
    out, scratch = (Guarded((size,), torch.uint8) for size in (expected.size, plan.middle_bytes))
    layout = 28, patch > 0, patch or 1
    sizes = plan.first_pixels, plan.canvas_pixels
    addresses = pixels.ctypes.data, scratch.address, out.address
    given = jobs.ctypes.data, len(jobs), words.ctypes.data, *layout, *sizes, *addresses
    assert call("make_tiles", *given) == (0, 2)
    np.testing.assert_array_equal(out.result().numpy().reshape(expected.shape), expected)
    scratch.result()


def test_the_parts_are_those_of_the_python_side():
    assert f"kConstantParts = {PARTS};" in (ROOT / "csrc/pack/pack.h").read_text(encoding="utf-8")
    assert set(native.CUDA_SUMS) == TYPES.keys() - {torch.float64}
