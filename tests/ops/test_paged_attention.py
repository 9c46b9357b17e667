"""paged_attention: every backend against float64, over caches of several segments, and against the paged cache."""

import pytest
import torch

from llava_fast.models.blocks.attention import Spans, attend
from llava_fast.models.fused.rotary import rotate
from llava_fast.models.paged_cache import BlockTable, PagedCache
from llava_fast.ops import paged_attention, use_backend
from llava_fast.ops.paging import block_addresses
from llava_fast.ops.triton_support import forced
from tests.support.kernel_checks import DEVICE, DTYPES, TOLERANCE, relative

on_backends = pytest.mark.parametrize("backend", ["reference", "triton"])


class Case:
    """A cache of random rows in segments, sequences with `before` rows each in shuffled blocks, one new row each."""

    def __init__(self, before, heads=4, kv_heads=2, size=8, rows=4, segments=(5, 9), layers=2, dtype=torch.float32):
        draw = torch.Generator().manual_seed(3)
        count, blocks = len(before), sum(segments)

        def random(*shape):
            return torch.randn(*shape, generator=draw).to(DEVICE, dtype)

        self.segments = [random(layers, 2, kv_heads, n, rows, size) for n in segments]
        self.query = random(count, heads, size)
        self.key, self.value = random(count, kv_heads, size), random(count, kv_heads, size)
        self.cos, self.sin = random(count, 1, size), random(count, 1, size)
        width = max(max(before) // rows + 1, 1)
        order = iter(torch.randperm(blocks, generator=draw).tolist())
        table = torch.full((count, width), blocks - 1)
        for number, at in enumerate(before):
            for slot in range(at // rows + 1 if at >= 0 else 0):
                table[number, slot] = next(order)
        self.table = table.to(DEVICE, torch.int32)
        self.before = torch.tensor(before, device=DEVICE, dtype=torch.int32)

    def run(self, backend, layer=1, window=None, blocks=None):
        """The result and the segments afterwards, as the backend leaves them; the case itself stays."""
        segments = [segment.clone() for segment in self.segments]
        with use_backend(backend):
            found = paged_attention(
                *(self.query, self.key, self.value, self.cos, self.sin, segments),
                *(block_addresses(segments, blocks), self.table, self.before, layer, window),
            )
        return found, segments

    def exact(self, layer=1, window=None):
        case = object.__new__(Case)
        vars(case).update(vars(self))
        for name in ("query", "key", "value", "cos", "sin"):
            setattr(case, name, getattr(self, name).cpu().double())
        case.segments = [segment.cpu().double() for segment in self.segments]
        case.table, case.before = self.table.cpu(), self.before.cpu()
        return case.run("reference", layer, window)


def check(case, backend, **options):
    found, segments = case.run(backend, **options)
    exact, exact_segments = case.exact(**options)
    limit = TOLERANCE[found.dtype]
    assert relative(found, exact) <= limit
    untouched = torch.ones(2, dtype=torch.bool)
    untouched[options.get("layer", 1)] = False
    for mine, theirs, was in zip(segments, exact_segments, case.segments, strict=True):
        assert relative(mine, theirs) <= limit
        assert torch.equal(mine[untouched], was[untouched])
        rows = (theirs != was.cpu().double()).any(-1)  # where a row was stored
        assert torch.equal(mine.cpu()[~rows], was.cpu()[~rows])


def test_the_reference_is_plain_attention():
    """By hand for one sequence: rotate, put the row behind the others, softmax."""
    case = Case([6])
    found, segments = case.exact()
    blocks = torch.cat([segment[1] for segment in segments], 2)[:, :, case.table[0].long().cpu()]  # [2, K, width, 4, 8]
    keys, values = blocks.flatten(2, 3)[:, :, :7].repeat_interleave(2, 1)  # [H, 7, D]
    query, key, cos, sin = (t.cpu().double() for t in (case.query, case.key, case.cos, case.sin))
    query = rotate(query, cos, sin)
    torch.testing.assert_close(keys[::2, 6], rotate(key, cos, sin)[0])
    scores = (keys @ query[0, :, :, None])[..., 0] * 8**-0.5
    torch.testing.assert_close(found[0], (scores.softmax(-1)[:, None] @ values).flatten())


@on_backends
@pytest.mark.parametrize(
    "before",
    [[0], [3], [4], [18, 0, 7], [30], [-1, 6, -1], [-1]],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 1, 5])
def test_lengths_windows_and_fillers(backend, before, window, poisoned):
    with forced({"split_kernel_fp32": {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1}}):
        check(Case(before, segments=(9, 1)), backend, window=window)


@on_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", [0, 1])
def test_dtypes_and_layers(backend, dtype, layer, poisoned):
    check(Case([9, 2], dtype=dtype), backend, layer=layer)


@on_backends
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 2), (14, 2, 6), (9, 3, 20), (20, 1, 16)], ids=str)
def test_shapes(backend, heads, kv_heads, size, poisoned):
    check(Case([11, 5], heads, kv_heads, size), backend)


@on_backends
def test_views_of_one_product(backend, poisoned):
    """Query, key and value as slices of a merged product, and q norms' contiguous results."""
    case = Case([9, 2])
    wide = torch.randn(2, 8 * 8, device=DEVICE)
    case.query, case.key, case.value = (part.unflatten(-1, (-1, 8)) for part in wide.split([32, 16, 16], -1))
    check(case, backend)


@on_backends
def test_a_nan_in_a_row_that_is_not_seen_stays_there(backend):
    case = Case([5], segments=(14,))
    clean, _ = case.run(backend)
    for segment in case.segments:
        cached = segment[1].flatten(2, 3)  # [2, K, rows, D]
        seen = [int(case.table[0, row // 4]) * 4 + row % 4 for row in range(6)]
        hidden = torch.ones(cached.shape[2], dtype=torch.bool)
        hidden[seen] = False
        cached[:, :, hidden] = torch.nan
    assert torch.equal(case.run(backend)[0], clean)


@on_backends
def test_addresses_may_be_more_than_the_blocks_there_are(backend):
    """A graph keeps one tensor for all blocks that there may be."""
    case = Case([9, 2])
    assert torch.equal(case.run(backend)[0], case.run(backend, blocks=40)[0])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_it_is_what_the_modules_do(backend):
    """attend() with the paged cache that generation has, three steps of three sequences."""
    cache = PagedCache(2, 2, 8, torch.float32, torch.device("cpu"), max_bytes=1 << 20, block_rows=4)
    other = PagedCache(2, 2, 8, torch.float32, torch.device("cpu"), max_bytes=1 << 20, block_rows=4)
    tables = [[BlockTable(each) for _ in range(3)] for each in (cache, other)]
    lengths = [5, 0, 11]
    for number, length in enumerate(lengths):
        for mine in tables:
            mine[number].reserve(length + 3)
        rows = torch.randn(2, 2, length, 8)
        for each, mine in zip((cache, other), tables, strict=True):
            for layer in range(2):
                each.append(layer, mine[number], 0, rows[layer], rows[layer] * 2)
    for step in range(3):
        query, key, value = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
        cos, sin = torch.randn(3, 1, 8), torch.randn(3, 1, 8)
        before = tuple(length + step for length in lengths)
        spans = Spans((0, 1, 2), (1, 1, 1), tuple(tables[0]), before)
        table = torch.tensor([t.blocks + [0] * (4 - len(t.blocks)) for t in tables[1]], dtype=torch.int32)
        for layer, window in enumerate((None, 6)):
            turned = rotate(query, cos, sin), rotate(key, cos, sin)
            expected = attend(*turned, value, spans, layer, cache, window)
            at = torch.tensor(before, dtype=torch.int32)
            with use_backend(backend):
                found = paged_attention(
                    *(query, key, value, cos, sin, other.segments, block_addresses(other.segments)),
                    *(table, at, layer, window),
                )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_bad_arguments():
    case = Case([9, 2])
    given = {
        "query": case.query,
        "key": case.key,
        "value": case.value,
        "cos": case.cos,
        "sin": case.sin,
        "segments": case.segments,
        "addresses": block_addresses(case.segments),
        "table": case.table,
        "before": case.before,
        "layer": 0,
    }
    for change, message in (
        ({"query": case.query[:, :3]}, "multiple of key heads"),
        ({"value": case.value[:, :1]}, "key and value"),
        ({"cos": case.cos[:1]}, "cos"),
        ({"segments": []}, "no segment"),
        ({"segments": [case.segments[0], case.segments[1][..., :2, :]]}, "same layers and block rows"),
        ({"segments": [case.segments[0].double()]}, "one floating dtype"),
        ({"segments": [case.segments[0].mT.contiguous().mT]}, "contiguous"),
        ({"layer": 2}, "layer 2 is not one of the cache's 2"),
        ({"addresses": case.table}, "addresses"),
        ({"table": case.table[0]}, "table"),
        ({"before": case.before.long()}, "int32"),
        ({"window": 0}, "window"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(**given | change)
