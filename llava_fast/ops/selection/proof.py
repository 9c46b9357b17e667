"""Tests whether a candidate is correct, and whether it is faster than the reference.

Correct: on a small call with seeded random values, (1) its error against float64 is at most twice that of the reference
in the same dtype, (2) every element of outputs pre-filled with NaN is written, and (3) a second run gives the same
bits. Arguments that the op writes count as outputs. (2) and (3) must also hold for the user's call, whose result must
agree with the reference's.
Faster: its median time is below the reference's by more than the spread; the two are timed alternately.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from llava_fast.errors import BackendError
from llava_fast.ops.selection.candidates import FORMS, Candidate, variations
from llava_fast.ops.selection.decision import Decision, decided
from llava_fast.ops.selection.samples import ROWS
from llava_fast.ops.selection.verdict import Verdict

Run = Callable[..., Any]
COPIES = 3
SLACK = 32  # tolerance for the user's call, whose values are not drawn: this many times the reference's error
ROTATED_BYTES = 64 << 20  # larger than any cache
FILLED_BYTES = 256 << 20
LEAST_ROUNDS, MOST_ROUNDS, ROUNDS_SECONDS = 7, 25, 0.3


class UnprovableError(Exception):
    """This call cannot be used to test candidates; another call of its class may be usable."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of a candidate and of the reference, timed alternately."""

    ms: float
    reference_ms: float
    spread_ms: float

    @property
    def is_faster(self) -> bool:
        return self.reference_ms - self.ms > self.spread_ms


@dataclass
class Trial:
    """One call with the reference results that its candidates are compared with."""

    run: Run
    args: Sequence[Any]
    samples: Sequence[Sequence[Any]]
    exact: list[Tensor] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    expected: list[Tensor] = field(default_factory=list)
    op: str = ""
    written: Sequence[int] = ()
    tolerance: float = 0.0
    held: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        reference = Decision("reference", is_trial=True)
        self.held = [[each.clone() for each in self._written(sample)] for sample in self.samples]
        with decided(reference):
            exact = (tree_map(_exact, list(sample)) for sample in self.samples)
            self.exact = _joined([*_tensors(self.run(*sample)), *self._written(sample)] for sample in exact)
            found = [self._outputs(number) for number in range(len(self.samples))]
            errors = self._errors(_joined(found))
            self.expected = _tensors(self.run(*self.args))
        for before, outputs in zip(self.held, found, strict=True):  # fill arguments that the op writes with NaN
            after = outputs[len(outputs) - len(before) :]
            for one, other in zip(before, after, strict=True):
                one[one != other] = torch.nan if one.is_floating_point() else torch.iinfo(one.dtype).max
        if any(bool(each.isnan().any()) for each in self.expected if each.is_floating_point()):
            raise UnprovableError("the reference's own result holds NaN")
        self.errors = [
            max(error, _rounding(each)) if error else 0.0 for error, each in zip(errors, found[0], strict=True)
        ]
        self.op = reference.asked[0] if reference.asked else ""

    def refusal(self, candidate: Candidate) -> tuple[str | None, float, Decision]:
        """(why it is not correct or None, its error, what ran)."""
        decision = Decision(candidate.backend, candidate.configs, is_trial=True)
        tried = [self._twice(decision, number) for number in range(len(self.samples))]
        why = next((why for _, why in tried if why is not None), None)
        errors = self._errors(_joined(found for found, _ in tried))
        worst = max(errors, default=0.0)
        for number, (error, reference) in enumerate(zip(errors, self.errors, strict=True)):
            if not error <= max(2 * reference, self.tolerance) and why is None:
                allowed = f"the {self.tolerance:.1e} allowed" if self.tolerance else "twice the reference's"
                why = f"output {number}: error {error:.1e} against float64, more than {allowed}"
        if why is None:
            found, why = self._twice(decision, None)
        if why is None:
            why = self._far_off(found)
        return why, worst, decision

    def _errors(self, found: Sequence[Tensor]) -> list[float]:
        return [_error(*pair) for pair in zip(found, self.exact, strict=True)]

    def _far_off(self, found: Sequence[Tensor]) -> str | None:
        """How a result of the user's call differs from the reference's, if by more than a tolerance. The tolerance is
        wide because the values were not drawn: sums may cancel (a mean of normalised rows is only rounding error) and
        have more terms."""
        rows = max((each.shape[0] for each in _tensors(self.args) if each.dim()), default=1)
        slack = SLACK * max(rows / ROWS, 1) ** 0.5
        floats = [each for each in self.expected if each.is_floating_point() and each.numel()]
        largest = max((each.double().square().mean().sqrt().item() for each in floats), default=0.0)
        for number, (one, other) in enumerate(zip(found, self.expected, strict=True)):
            off = _error(one, other, least=0.1 * largest * other.numel() ** 0.5)
            if not off <= max(slack * self.errors[number], 2 * self.tolerance):
                return f"output {number}: differs by {off:.1e} from the reference's in the user's call"
        return None

    def _written(self, args: Sequence[Any]) -> list[Tensor]:
        return _tensors([args[number] for number in self.written])

    def _outputs(self, number: int | None) -> list[Tensor]:
        """Outputs of sample `number`, or of the user's call (None), with copies of the arguments that it writes. The
        user's call writes to its own memory; running it again later writes the same values."""
        if number is None:
            return _tensors(self.run(*self.args))
        sample = self.samples[number]
        for each, held in zip(self._written(sample), self.held[number], strict=True):
            each.copy_(held)
        return [*_tensors(self.run(*sample)), *(each.clone() for each in self._written(sample))]

    def _twice(self, decision: Decision, number: int | None) -> tuple[list[Tensor], str | None]:
        with decided(decision), memory_of_nan():
            first = self._outputs(number)
            second = self._outputs(number)
        why = None
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            if one.is_floating_point() and bool(one.isnan().any()):
                why = why or f"output {number}: not every element is written"
            elif not torch.equal(one, other):
                why = why or f"output {number}: a second run gives different bits"
        return first, why


def prove(
    run: Run,
    args: Sequence[Any],
    samples: Sequence[Sequence[Any]],
    thorough: bool = False,
    written: Sequence[int] = (),
    tolerance: float = 0.0,
) -> Verdict:
    """Test the backends of an op on a call `run(*args)`. samples: arguments of small calls; written: indices of the
    arguments that the op writes to; tolerance: an error against float64 that is allowed in any case.

    thorough: try each listed configuration of its Triton kernels, not only the shipped one. Raises UnprovableError if
    the call's values cannot tell a correct candidate from a wrong one, torch.OutOfMemoryError if the copies do not fit.
    """
    refused: dict[str, str] = {}
    device = next(each for each in tree_leaves(list(args)) if isinstance(each, Tensor)).device
    best: tuple[Times, float, Candidate] | None = None
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        args = tree_map_only(Tensor, Tensor.detach, list(args))
        trial = Trial(run, args, samples, written=written, tolerance=tolerance)
        inputs = rotated(args)
        clock = Clock(device)

        def attempt(candidate: Candidate) -> Decision | None:
            nonlocal best
            try:
                why, error, ran = trial.refusal(candidate)
                if why is None:
                    times = clock.in_turn(run, inputs, Candidate("reference"), candidate)
                    if not times.is_faster:
                        why = f"{times.ms:.3g} ms, the reference {times.reference_ms:.3g}, spread {times.spread_ms:.2g}"
                    elif best is None or times.ms / times.reference_ms < best[0].ms / best[0].reference_ms:
                        best = times, error, candidate
            except BackendError:
                return None  # the op has no such backend, or it does not support this call
            except torch.OutOfMemoryError:
                raise
            except Exception as failure:  # a kernel that does not compile or launch on this machine
                why, ran = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}", None
            if why is not None:
                refused[str(candidate)] = why
            return ran

        for form in FORMS:
            ran = attempt(Candidate(form))
            if thorough and ran is not None and form == "triton":
                for _, candidate in variations(Candidate(form), ran.kernels):
                    attempt(candidate)
    reference_error = max(trial.errors, default=0.0)
    said = {"op": trial.op, "reference_error": reference_error, "refused": refused}
    said |= {"found": time.strftime("%Y-%m-%d"), "by": "tune" if thorough else "first use"}
    if best is None:
        return Verdict(backend="reference", error=reference_error, **said)
    times, error, kept = best
    configs = {kernel: dict(config) for kernel, config in kept.configs.items()}
    figures = {"ms": times.ms, "reference_ms": times.reference_ms, "spread_ms": times.spread_ms}
    return Verdict(backend=kept.backend, configs=configs, error=error, **figures, **said)


@contextlib.contextmanager
def memory_of_nan() -> Iterator[None]:
    """Inside the block, allocated memory is filled with NaN (integers: the largest value)."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before, warn_only=warns)


def rotated(args: Sequence[Any]) -> list[list[Any]]:
    """Copies of a call's arguments to use in rotation, so that no run finds its arguments in a cache."""

    def copy(tensor: Tensor) -> Tensor:
        if tensor.nbytes > ROTATED_BYTES or 0 in tensor.stride():  # or an expanded tensor
            return tensor
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
            tensor
        )

    return [list(args), *(tree_map_only(Tensor, copy, list(args)) for _ in range(COPIES - 1))]


class Clock:
    """Times calls on a device: by the wall clock on a CPU, by events on CUDA. There, each call follows a fill of memory
    larger than the caches, during which the host queues the call, so that launch time is not measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._filler = torch.empty(FILLED_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def in_turn(self, run: Run, inputs: Sequence[Sequence[Any]], *candidates: Candidate) -> Times:
        """Times of the second candidate and of the first, the reference. Both must have run before (warm)."""
        decisions = [Decision(each.backend, each.configs, is_trial=True) for each in candidates]
        found: list[list[float]] = [[], []]
        started = time.perf_counter()
        for number in range(MOST_ROUNDS):
            for side in (0, 1) if number % 2 else (1, 0):
                with decided(decisions[side]):
                    found[side].append(self._once(run, inputs[number % len(inputs)]))
            if number + 1 >= LEAST_ROUNDS and time.perf_counter() - started > ROUNDS_SECONDS:
                break
        reference, own = found
        spread = max(map(_interquartile, found))
        return Times(statistics.median(own), statistics.median(reference), spread)

    def _once(self, run: Run, args: Sequence[Any]) -> float:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._filler.zero_()
            begin.record()
            run(*args)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)
        begun = time.perf_counter()
        run(*args)
        return 1e3 * (time.perf_counter() - begun)


def _interquartile(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4)
    return high - low


def _tensors(found: Any) -> list[Tensor]:
    return [each for each in tree_leaves(found) if isinstance(each, Tensor)]


def _joined(results: Iterable[Any]) -> list[Tensor]:
    """Concatenate each output over several runs."""
    return [torch.cat([each.flatten() for each in output]) for output in zip(*map(_tensors, results), strict=True)]


def _exact(arg: Any) -> Any:
    """The argument in float64; a dtype argument (of a result) becomes float64 too."""
    if isinstance(arg, Tensor):
        return arg.double() if arg.is_floating_point() else arg
    return torch.float64 if isinstance(arg, torch.dtype) and arg.is_floating_point else arg


def _rounding(like: Tensor) -> float:
    """About the error of a correctly rounded result: a lower bound for the reference's error."""
    return torch.finfo(like.dtype).eps / 4 if like.is_floating_point() else 0.0


def _error(found: Tensor, exact: Tensor, least: float = 1e-300) -> float:
    """||found - exact|| / max(||exact||, least); infinite for NaN and mismatched shapes; 0 or infinite for integers."""
    if found.shape != exact.shape:
        return float("inf")
    if not found.is_floating_point():
        return 0.0 if torch.equal(found, exact) else float("inf")
    if not exact.numel():
        return 0.0
    error = ((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(least)).item()
    return error if error == error else float("inf")
