"""The suites by name. Each module defines the cases of one stage: `cases(subject, settings)` yields `Case`s."""

from __future__ import annotations

from benchmarks.suites import accelerate, decode, dpo, encode, generate, loss, packing, prefill, preprocess, train_step

SUITES = {
    "preprocess": preprocess,
    "encode": encode,
    "prefill": prefill,
    "decode": decode,
    "generate": generate,
    "train-step": train_step,
    "loss": loss,
    "packing": packing,
    "dpo": dpo,
    "accelerate": accelerate,
}
