"""The candidates for a call: the backends of its op, and for Triton kernels each of a few launch configurations.

The configurations are listed in ops/tuned/candidates.json. Those of the shipped tables, measured on other machines, are
tried first; they are tested like every other candidate before use.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files

from llava_fast.ops.selection.decision import Config

FORMS = ("native", "cublas", "eight_bit", "varlen", "xformers", "padded", "triton")
SERVED: dict[str, dict[str, str]] = {}
"""Op -> backend -> devices, as registered by `ops/backend.register`."""


@dataclass(frozen=True)
class Candidate:
    """A backend of an op, and launch configurations of its kernels that override the tables'."""

    backend: str
    configs: Mapping[str, Config] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = (f"{kernel}({', '.join(f'{k}={v}' for k, v in c.items())})" for kernel, c in self.configs.items())
        return " ".join((self.backend, *settings))


@functools.cache
def configurations() -> dict[str, list[Config]]:
    """Kernel -> launch configurations worth trying."""
    return json.loads((files("llava_fast.ops") / "tuned" / "candidates.json").read_text())


def variations(best: Candidate, kernels: Mapping[str, Config]) -> Iterator[tuple[str, Candidate]]:
    """(kernel, candidate) for each configuration of each kernel in `kernels` (kernel -> configuration that the call
    launched); the other kernels keep their configurations of `best`."""
    for kernel, used in kernels.items():
        for config in configurations().get(kernel, []):
            if config != used:
                yield kernel, Candidate(best.backend, {**best.configs, kernel: config})
