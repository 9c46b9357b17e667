"""The environment of processes that run vLLM, for benchmarks and tests: one CPU thread, no network, a small cache."""

from __future__ import annotations

import os
from pathlib import Path

from llava_fast.integrations.vllm import SWITCH

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def environment(plugin: bool, cache: Path | None = None) -> dict[str, str]:
    """With or without llava_fast in vLLM; `cache` is where vLLM keeps files, if not where it does by default. vllm_site
    is on the path (see there)."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "LLAVA_FAST_VLLM_TOLD")
    }
    paths = [str(ROOT / "benchmarks" / "vllm_site"), str(ROOT)]
    own = {SWITCH: str(int(plugin)), "PYTHONPATH": os.pathsep.join(paths)}
    return kept | SETTINGS | own | ({} if cache is None else {"VLLM_CACHE_ROOT": str(cache)})
