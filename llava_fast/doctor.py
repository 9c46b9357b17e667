"""`llava-fast doctor`: this machine's devices and versions, the backend that each op would use and why, and what
`accelerate` replaces.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform

import torch

import llava_fast._C as _C
from llava_fast.errors import BackendError
from llava_fast.models.fused.gate import RULES
from llava_fast.ops import backend, triton_support  # importing the package registers every op
from llava_fast.ops.selection import store, tables
from llava_fast.ops.selection.machine import machine_of
from llava_fast.version import __version__

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "pillow",
    "numpy",
    "xformers",
    "av",
    "compressed-tensors",
)


def report(model: str | None = None) -> str:
    """Plain text: versions, devices, the compiled extension, a table of ops, and what accelerate would replace, in
    every family or in the Hugging Face checkpoint `model`. Raises CheckpointError, UnsupportedModelError."""
    from llava_fast.accelerated import report as accelerated  # imported late: transformers takes seconds

    replaced = accelerated.families() if model is None else accelerated.of_path(model)
    lines = [f"llava_fast {__version__} on Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {name:<18} {_version(name)}" for name in PACKAGES]
    lines += ["", "devices", f"  CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(f"  cuda:{index}: {torch.cuda.get_device_name(index)}, capability {major}.{minor}")
    else:
        lines.append("  CUDA: none usable here")
    lines.append(
        f"  llava_fast._C: built {'with' if _C.built_with_cuda() else 'without'} CUDA; "
        f"CUDA kernels are {'usable' if _C.has_cuda() else 'not usable'} here"
    )
    lines += ["", f"ops (LLAVA_FAST_BACKEND={backend.of_process()})"]
    width = max(map(len, backend.served()))
    for name, backends in sorted(backend.served().items()):
        has = "; ".join(f"{kind} ({devices})" for kind, devices in backends.items())
        lines.append(f"  {name:<{width}} on a CPU: {_choice(name, 'cpu')}; on CUDA: {_choice(name, 'cuda')}; has {has}")
    lines += ["", "ops in place of modules (a module that is wrapped, hooked, quantised or sharded runs itself)"]
    width = max(map(len, RULES))
    for name, rule in RULES.items():
        runs = {device: "the op" if backend.serves(name, device) else "its steps" for device in ("cpu", "cuda")}
        compiled = "the op" if rule.traced else "its steps"
        autocast = "" if rule.autocast else ", under autocast its steps"
        where = f"on a CPU {runs['cpu']}, on CUDA {runs['cuda']}, under torch.compile {compiled}{autocast}"
        lines.append(f"  {name:<{width}} for {rule.modules}: {where}")
    lines += ["", *_selection(), ""]
    kind = triton_support.device_kind(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    measured = "measured on it" if triton_support.table(kind) and kind != "default" else "starting values, not measured"
    lines.append(f"  Launch configurations of the Triton kernels: the table of {kind!r} ({measured})")
    lines += ["", *replaced]
    return "\n".join(lines)


def _selection() -> list[str]:
    """How ops choose a backend if none is requested, and the verdicts of each device's table."""
    settings = tables.settings()
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count()) if torch.cuda.is_available()]
    lines = [f"selection (LLAVA_FAST_SELECT={settings.mode or ''}; `llava-fast tune` finds verdicts)"]
    for device in devices:
        try:
            verdicts = settings.table(device).verdicts
        except BackendError as error:
            lines.append(f"  {device}: {error}")
            continue
        mode = settings.mode_on(device.type)
        where = os.environ["LLAVA_FAST_SELECTION"] if mode == "pinned" else store.path_of(machine_of(device))
        lines.append(f"  {device}: {mode}, {len(verdicts)} verdicts" + f" in {where}" * bool(verdicts))
        for name, verdict in verdicts.items():
            lines += [f"    {name}", f"      {verdict}"]
    return lines


def _choice(op: str, device: str) -> str:
    try:
        return backend.choose(op, device)
    except backend.BackendError as error:
        return f"none: {error}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
