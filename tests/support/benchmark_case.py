"""A benchmark case whose two sides return constants, and the ceilings of a made-up machine."""

import torch

from benchmarks import checks
from benchmarks.case import Case, Provider
from benchmarks.floors import Floor, Phase
from benchmarks.machine import Ceilings

CEILINGS = Ceilings(bytes_per_second=1e9, flops_per_second=1e10)


def case(ours: float, theirs: float = 1.0, backends=("llava_fast", "hf-eager")) -> Case:
    values = {"llava_fast": ours, "hf-eager": theirs}
    return Case(
        suite="encode",
        model="tiny",
        real_width=False,
        label="a constant",
        providers=[Provider(name, lambda i, v=values[name]: torch.full((4,), v)) for name in backends],
        check=checks.close("constant", "float32"),
        floor=Floor((Phase(10, 1000),)),
        items=2,
        unit="images",
    )
