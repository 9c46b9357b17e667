"""The key of a table of verdicts: the machine, the software versions and a hash of the kernels' sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from llava_fast.version import __version__

Machine = dict[str, str]


def machine_of(device: torch.device) -> Machine:
    """The key of a device's verdicts: name -> value; "device" is the model of the GPU or CPU."""
    return {**_hardware(device), **_software(), "kernels": kernels_hash()}


@functools.cache
def _hardware(device: torch.device) -> Machine:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        processors = str(properties.multi_processor_count)
        return {"device": properties.name, "multiprocessors": processors, "driver": _driver()}
    capability = torch.backends.cpu.get_cpu_capability()
    return {"device": _cpu_name(), "instructions": capability, "threads": str(torch.get_num_threads())}


@functools.cache
def _software() -> Machine:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {"torch": torch.__version__, "triton": triton, "llava_fast": __version__}


@functools.cache
def kernels_hash() -> str:
    """A hash of everything that defines the kernels: the sources and tables of `ops`, and the compiled extension."""
    import llava_fast._C as _C

    found, folder = hashlib.sha256(), Path(__file__).parents[1]
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".json"))
    for path in (*paths, Path(_C.__file__)):
        found.update(str(path.name).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    said = re.search(r"\d+\.\d+(\.\d+)?", path.read_text()) if path.is_file() else None
    return said[0] if said else "unknown"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    said = re.search(r"^model name\s*: (.+)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return said[1].strip() if said else platform.processor() or platform.machine()
