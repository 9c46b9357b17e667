"""A GPU of fake tensors: shapes, dtypes and devices are tracked, nothing is computed (torch's FakeTensorMode).

What it shows without a GPU: no operation mixes tensors of the CPU with tensors of the GPU, and how often the host reads
a value back from the device, for which it waits on a GPU. (A copy to the device from memory that is not pinned makes it
wait too, and is not seen.) Fake tensors may say "cuda" in a PyTorch without CUDA, but
autograd asks for that device's streams: device.cpp gives it some. `load` must come before torch is imported, so this
runs in a process of its own (programs.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

IMPLEMENTATIONS: dict[str, Callable] = {}  # of operators defined in Python, by name


def load(folder: Path) -> None:
    """Compile device.cpp into a folder and load it, before torch."""
    os.environ["LLAVA_FAST_SELECT"] = "off"  # nothing that is fake can be timed
    found = importlib.util.find_spec("torch")
    assert found
    assert found.origin
    torch = Path(found.origin).parent
    library = folder / "device.so"
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", "-w", f"-I{torch}/include", f"-L{torch}/lib"]
    source = Path(__file__).with_name("device.cpp")
    subprocess.run(["g++", *flags, str(source), "-lc10", "-ltorch_cpu", "-o", str(library)], check=True)
    ctypes.CDLL(str(torch / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))

    from torch import backends, cuda
    from torch.library import Library

    class Event:
        """Of a stream that has done all that it was given."""

        def record(self, stream: None) -> None: ...

        def synchronize(self) -> None: ...

    cuda.Event, cuda.current_stream = Event, lambda device: None
    cuda.current_device = lambda: 0
    cuda.is_bf16_supported = lambda *_: True
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_name = lambda *_: "a GPU that is not there"
    backends.cuda.is_flash_attention_available = lambda: True
    cuda.mem_get_info = lambda *_: (1 << 34, 1 << 34)
    cuda.amp.common.amp_definitely_not_available = lambda: False
    register = Library.impl

    def impl(self, name, function, key="", **options):
        if key == "CompositeExplicitAutograd":
            IMPLEMENTATIONS[name] = function
        return register(self, name, function, key, **options)

    Library.impl = impl


LAUNCHES = {"llava_fast::paged_attention": 3, "torch_attn::_varlen_attn": 1}


RUN = {"llava_fast::quantised_linear", "llava_fast::quantised_linear_backward"}
"""Operators of several kernels: with the Triton backend they run, but for the kernels themselves."""


class Reads(list[str]):
    """The reads of the host, how many kernels were launched, and the names of Triton's in the operators of RUN."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.kernels: list[str] = []


class Launched:
    """In place of a Triton kernel: counts its launches."""

    def __init__(self, kernel, reads: Reads) -> None:
        self.__name__, self.reads = kernel.__name__, reads

    def __getitem__(self, grid):
        def launch(*_, **__) -> None:
            self.reads.launches += 1
            self.reads.kernels.append(self.__name__)

        return launch


def is_free(function) -> bool:
    """Whether an operator launches nothing: a view, or memory alone."""
    returns = function._schema.returns
    if any(each.alias_info is not None and each.alias_info.is_write for each in function._schema.arguments):
        return False
    return any(each.alias_info is not None for each in returns) or function.name().startswith("aten::empty")


@contextlib.contextmanager
def fake_gpu() -> Iterator[Reads]:
    """Tensors made inside are fake. Gives a list that grows by the name of the operation whenever the host reads from
    the device; what it reads is 1. Its `launches` counts the kernels that the operators would launch on the GPU: one
    for each that is no view and allocates more than memory, those of LAUNCHES as given there; those of RUN run."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from llava_fast.ops import sums
    from llava_fast.ops.backend import requested
    from llava_fast.ops.quantised_linear import triton_kernels

    reads = Reads()
    kernels = [(sums, "sum_shares_kernel")]
    kernels += [(triton_kernels, name) for name in vars(triton_kernels) if name.endswith("_kernel")]
    aten = torch.ops.aten

    def on(tensor, kind: str) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.device.type == kind

    class Device(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function in (aten.item.default, aten._local_scalar_dense.default):
                if on(args[0], "cuda"):
                    reads.append("item")
                return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
            if function in (aten.pin_memory.default, aten._pin_memory.default):  # fake tensors know no such thing
                return args[0]
            # Not its shapes alone: the reference, or what launches the kernels.
            if function.namespace == "llava_fast" and (requested() != "triton" or function.name() in RUN):
                with self:
                    return IMPLEMENTATIONS[function.name().split("::")[1]](*args, **kwargs)
            out = function(*args, **kwargs)
            there = any(on(each, "cuda") for each in tree_leaves(out))
            if (there or (function is aten.copy_.default and on(args[1], "cuda"))) and not is_free(function):
                reads.launches += LAUNCHES.get(function.name(), 1)
            waits = not (function is aten.copy_.default and len(args) > 2 and args[2])
            if any(on(each, "cpu") for each in tree_leaves(out)) and any(on(arg, "cuda") for arg in args[:2]) and waits:
                reads.append(f"{function} to the host")
            return out

    class Attention(TorchFunctionMode):
        """One kernel on a GPU (flash or memory-efficient), of which fake tensors see the steps; its result lies in
        memory as [batch, rows, heads, size]."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            before = reads.launches
            out = function(*args, **(kwargs or {}))
            if function is torch.nn.functional.scaled_dot_product_attention and on(out, "cuda"):
                out = out.transpose(1, 2).contiguous().transpose(1, 2)
                reads.launches = before + 1
            return out

    with contextlib.ExitStack() as stack:
        for module, name in kernels:
            stack.enter_context(mock.patch.object(module, name, Launched(getattr(module, name), reads)))
        for mode in (Attention(), FakeTensorMode(allow_non_fake_inputs=True), Device()):
            stack.enter_context(mode)
        yield reads
