"""What every test starts from: no network, fixed seeds, one thread."""

import contextlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported anywhere
os.environ["LLAVA_FAST_SELECT"] = "off"  # each op runs its default, whatever this machine has found before
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or `poisoned` makes every matrix product on CUDA raise

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined: without a GPU, kernels run in the interpreter

import numpy as np
import pytest

from tests.support import interpreter

if "TRITON_INTERPRET" in os.environ:
    with contextlib.suppress(ImportError):  # Triton is for Linux alone
        interpreter.mend()

# Tiny tensors gain nothing from a second thread, and on a busy machine two threads spin waiting for each other.
torch.set_num_threads(1)
with contextlib.suppress(ImportError):  # a GPU machine that runs tests/ops alone may lack it
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.load_profile("repeatable")


def pytest_collection_modifyitems(config, items):
    """Mark what tests/slow.txt names: a file, or a test of one with all its parameters."""
    lines = (config.rootpath / "tests" / "slow.txt").read_text(encoding="utf-8").splitlines()
    slow = {line for line in lines if line and line[0] != "#"}
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in slow or name.partition("::")[0] in slow:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def select(monkeypatch, tmp_path):
    """`select(LLAVA_FAST_SELECT="first-use", ...)` sets these variables, with verdicts in a folder of this test's own,
    and gives the settings that this process then has. Proofs time each form only twice."""
    from llava_fast.ops.selection import proof, tables

    def begin(**environment):
        for name, value in {"LLAVA_FAST_CACHE": str(tmp_path), **environment}.items():
            monkeypatch.setenv(name, value)
        tables.settings.cache_clear()
        return tables.settings()

    monkeypatch.delenv("LLAVA_FAST_SELECT")
    monkeypatch.setattr(proof, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(proof, "ROUNDS_SECONDS", 0.0)
    yield begin
    monkeypatch.undo()
    tables.settings.cache_clear()


@pytest.fixture
def poisoned():
    """Memory that an op allocates holds NaN until it is written, and an op that is not deterministic on CUDA raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_terminal_summary(terminalreporter):
    from tests.support.parity import TIES, WORST

    for what, error in sorted(WORST.items()):
        terminalreporter.write_line(f"worst relative error, {what}: {error:.1e}")
    if TIES["tokens"]:
        terminalreporter.write_line(f"greedy tokens against transformers: {TIES['tokens']}, ties {TIES['ties']}")


@pytest.fixture
def served(monkeypatch):
    """For played graphs (tests/support/played.py): the gate takes paged_attention, whose reference then runs, a hundred
    times faster than the interpreter."""
    from llava_fast.ops import backend, use_backend

    monkeypatch.setattr(backend, "serves", lambda op, device: op == "paged_attention")
    with use_backend("reference"):
        yield
