"""Which candidates a test rejects. The wrong ones are faster than the reference, so a missing check would accept
them."""

import time

import pytest
import torch

from llava_fast.errors import BackendError
from llava_fast.ops.selection import proof
from llava_fast.ops.selection.candidates import Candidate, variations
from llava_fast.ops.selection.decision import Decision, current

CALL, SAMPLE = [torch.linspace(-2, 3, 128).view(8, 16)], [torch.linspace(-1, 1, 64).view(4, 16)]


def prove(planted, call=CALL):
    """The verdict on an op that halves its input, whose native form is `planted`."""

    def run(x):
        if current().backend == "reference":
            time.sleep(0.002)
            return x * 0.5 + x.square() * 1e-9
        if current().backend != "native":
            raise BackendError("it has no such form")
        return planted(x)

    return proof.prove(run, call, [SAMPLE])


def right(x):
    return torch.empty_like(x).copy_(x * 0.5 + x.square() * 1e-9)


def test_the_fastest_right_form_is_kept_with_its_figures():
    verdict = prove(right)
    assert (verdict.backend, verdict.refused, verdict.by) == ("native", {}, "first use")
    assert verdict.error <= 2 * verdict.reference_error < 1e-6
    assert 0 < verdict.ms < verdict.reference_ms - verdict.spread_ms
    assert verdict.reference_ms > 2


def wrong(x):
    return right(x) * (1 + 3e-6)


def unwritten(x):
    """Leaves its last row, unseen where the memory happens to hold what was there before."""
    out = torch.empty_like(x)
    if bool(out.isnan().all()):
        out[:-1] = right(x)[:-1]
        return out
    return right(x)


def unsteady(x):
    """Within the error, but another result at each run."""
    unsteady.runs += 1
    return torch.nextafter(right(x), torch.full_like(x, 9.0)) if unsteady.runs % 2 else right(x)


unsteady.runs = 0


def wrong_when_large(x):
    return right(x) if len(x) == len(SAMPLE[0]) else right(x) * 1.01


def of_another_shape(x):
    return right(x)[:-1]


def failing(x):
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize(
    ("planted", "why"),
    [
        (wrong, "e-06 against float64, more than twice the reference's"),
        (unwritten, "output 0: not every element is written"),
        (unsteady, "output 0: a second run gives different bits"),
        (wrong_when_large, "output 0: differs by 1.0e-02 from the reference's in the user's call"),
        (of_another_shape, "error inf against float64"),
        (failing, "RuntimeError: out of resource: shared memory"),
    ],
)
def test_a_wrong_form_is_refused(planted, why):
    verdict = prove(planted)
    assert verdict.backend == "reference"
    assert verdict.ms is None
    assert why in verdict.refused["native"]


def test_a_slower_form_is_refused():
    def slow(x):
        time.sleep(0.004)
        return right(x)

    assert "ms, the reference 2" in prove(slow).refused["native"]


def test_one_that_is_faster_by_less_than_the_spread_is_no_faster():
    assert proof.Times(ms=1.0, reference_ms=1.2, spread_ms=0.1).is_faster
    assert not proof.Times(ms=1.0, reference_ms=1.2, spread_ms=0.3).is_faster


def test_a_call_without_numbers_proves_nothing():
    with pytest.raises(proof.UnprovableError, match="holds NaN"):
        prove(right, [torch.full((8, 16), float("nan"))])


def test_memory_of_nan_is_left_as_it_was():
    before = torch.are_deterministic_algorithms_enabled()
    with proof.memory_of_nan():
        assert torch.empty(4).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_inputs_are_rotated_with_their_strides():
    wide = torch.arange(12.0).view(3, 4)
    inputs = proof.rotated([wide[:, :2], [wide], "gelu", wide[:1].expand(5, 4)])
    assert len(inputs) == proof.COPIES
    for other in inputs[1:]:
        assert other[0].stride() == (4, 1)
        assert torch.equal(other[0], wide[:, :2])
        assert other[0].data_ptr() != wide.data_ptr() != other[1][0].data_ptr()
        assert other[2] == "gelu"
        assert torch.equal(other[3], inputs[0][3])


def test_each_configuration_of_a_kernel_is_tried_once():
    used = {"rms_norm_kernel": {"num_warps": 8}, "unlisted_kernel": {"BLOCK": 1}}
    found = [str(each) for _, each in variations(Candidate("triton"), used)]
    assert found == [f"triton rms_norm_kernel(num_warps={warps})" for warps in (2, 4, 16)]


def test_thorough_takes_the_configuration_that_is_fastest():
    def run(x):
        decision: Decision = current()
        if decision.backend == "reference":
            time.sleep(0.004)
        elif decision.backend == "triton":
            decision.kernels["rms_norm_kernel"] = {"num_warps": 8}
            time.sleep(0.001 if decision.configs.get("rms_norm_kernel") == {"num_warps": 4} else 0.003)
        else:
            raise BackendError("it has no such form")
        return x * 0.5

    verdict = proof.prove(run, CALL, [SAMPLE], thorough=True)
    assert (verdict.backend, verdict.by) == ("triton", "tune")
    assert verdict.configs == {"rms_norm_kernel": {"num_warps": 4}}
    assert not proof.prove(run, CALL, [SAMPLE]).configs
