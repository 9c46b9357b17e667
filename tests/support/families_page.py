"""docs/families.md, made from the registry of families and the figures in docs/families.json.

python -m tests.support.families_page            write the page
python -m tests.support.families_page --measure  and measure the figures again (a minute)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llava_fast.families import FAMILIES
from llava_fast.families.base import Family
from tests.support import tiny

DOCS = Path(__file__).parents[2] / "docs"
BOUND = 1e-4
PARITY = "tests/test_parity_logits.py", "tests/test_parity_gradients.py"
OWN_TESTS = {
    "llava_llama": ("tests/checkpoints/test_checkpoint_save.py", "tests/checkpoints/test_checkpoint_original.py"),
    "llava_uhd": ("tests/checkpoints/test_llava_uhd.py", "tests/train/test_guests_train.py"),
    "slime": ("tests/checkpoints/test_slime.py", "tests/train/test_guests_train.py"),
    "InternLMXComposer": ("tests/checkpoints/test_xcomposer.py",),
    "llama_vid": ("tests/checkpoints/test_llama_vid.py",),
    "qwen": ("tests/checkpoints/test_qwen_vl.py", "tests/models/test_qwen_vit.py"),
    "monkey": ("tests/checkpoints/test_qwen_vl.py", "tests/models/test_qwen_vit.py"),
}
"""Tests of families that transformers does not have."""
TRAINED, SERVED = "tests/train/test_guests_train.py", "tests/serve/test_families_served.py"
"""Tests with a parameter for each family."""

HEAD = """# Families

What `llava_fast.load` reads, by the `model_type` of its config.json. A family is one file in `llava_fast/families`.
This page is generated from their registry (`python -m tests.support.families_page`); a test checks that it is current.

Each is compared with its reference on tiny random models in float32, on a CPU: logits and every gradient agree within
1e-4 of the tensor's largest value (the table has the worst errors seen). Families that transformers implements also
give the same greedy tokens, singly and in a mixed batch. Each is trained by a recipe, saved and loaded again, and
answers behind the server as it does by `generate`. "hf" is transformers' layout, "original" that of the system's own
code. The last three columns name the tests.

| system | model_type | formats | takes | logits, gradients | reference | compared by | trains | serves |
|---|---|---|---|---|---|---|---|---|
"""
FOOT = """
`accelerate` and `FastProcessor` support LLaVA 1.5, NeXT, NeXT-Video and OneVision ([with transformers](huggingface.md))
and name any other model they are given as unsupported. Refused by name: videos of InternVL, Idefics3, SmolVLM,
LLaVA-UHD, SliME, Qwen-VL and Monkey, LLaVA-UHD v2 and v3, SliME's trained router, TextMonkey, and LLaMA-VID with CLIP
or without queries.

LLaMA-VID was trained with the image in every question of a dialogue, and each question makes its own rows of it: here a
question without an image gets the last one's (`ProcessorOptions(image_turns="given")`: not). Of a video file it takes 1
frame a second (`video_fps`), in `batch` and `serve` too, unless a number is given (`video_frames`, `--video-frames`).
InternLM-XComposer's own demos answer by five beams, which are not offered here, and a repetition penalty of 1.5
(`repetition_penalty`).

SliME's router keeps as many rows of an image as the prompt's text asks for. `count_tokens`, `llava-fast data` and the
server's plan say the maximum (`optional_tokens` of the plan are those that may be left out); `usage` of an answer, and
`model.routed(batch)`, say what was kept. Its trainer let the router read the answers too, which no prompt has: here it
reads the prompt alone, or what its trainer did with `data.router_text: all`. A prompt whose maximum fills the
context is refused; in others the answer may have the room of the rows that were left out.

From tiles to the decoder's inputs beside SliME's published steps, one picture of 1024x768 and 64 tokens, CLIP-L with 4
layers of random weights, one thread of a shared AMD EPYC, equal rows to 6e-7: 6.0 s and 336 MiB at the peak, published
11.1 s and 2790 MiB (`benchmarks/slime.py`, `benchmarks/results/2026-11-29-cpu-2core-slime-visual.json`). The original
compares every row with every token at once; the sum over the tokens can be taken first.

LLaVA-UHD's first release in the same way (`benchmarks/uhd_first.py`, `-uhd-first-visual.json`), beside its steps for
one slice after the other: 7.8 s and 388 MiB, 9.1 s and 87 MiB. All seven slices run at once here, so its peak is
higher.

BLIP-2 of stage 1 (class `Blip2ForImageTextRetrieval`) has no language model: `llava_fast.load_retrieval` reads it,
scores agree with transformers' within 1e-5 (`tests/models/test_retrieval.py`), and a recipe's section `stage_one`
trains it ([training](training.md#blip-2-stage-1)).

Qwen-VL and Monkey are read from the published files: qwen.tiktoken becomes a tokenizer without running the checkpoint's
code, and a saved model has tokenizer.json in its place; for the published code, copy its .py files and qwen.tiktoken
beside the saved ones. A prompt has `<image>` where theirs has `<img>path</img>`. Prompts beyond seq_length (2048) and
answers that grow beyond it follow use_dynamic_ntk and use_logn_attn as the published code does at inference: the RoPE
base is that of the prompt's length, all through the answer. `llava_fast.inputs.chat.boxes` reads boxes out of answers
and writes them into prompts. A Monkey is trained from a Monkey; making one from Qwen-VL's weights is not supported.

From a picture to the decoder's rows beside the published code, published widths, 2 of 48 layers of random weights,
float32, two threads of a shared AMD EPYC, equal rows to 7e-7 (`benchmarks/qwen_vl.py`), this package / published:

| run | Qwen-VL, s | Monkey, s | Qwen-VL, peak MiB | Monkey, peak MiB |
|---|---|---|---|---|
| all views at once (`-at-once.json`) | 1.88 / 1.95 | 8.5 / 10.0 | 157 / 212 | 562 / 294 |
| a tile's MLP and resampler alone (`-by-tile.json`) | 2.44 / 2.00 | 13.9 / 14.1 | 137 / 202 | 337 / 333 |

(`benchmarks/results/2026-11-29-cpu-2core-epyc-qwen-vl-monkey-visual-*.json`.) Other work disturbed the
times of the second run, of both sides alike. The final code was not timed.
"""


def families() -> list[Family]:
    """Each family once, in the order of the registry."""
    return [FAMILIES[name]() for name in FAMILIES if FAMILIES[name].model_types[0] == name]


def cases(family: Family) -> list[str]:
    """Its tiny models, which tests/test_parity_* compare with transformers."""
    return [name for name, case in tiny.CASES.items() if case.kind in family.model_types]


def named_tests(family: Family) -> tuple[str, ...]:
    return OWN_TESTS.get(family.model_types[0]) or PARITY


def page(figures: dict[str, dict[str, float]]) -> str:
    return HEAD + "".join(row(family, figures.get(family.model_types[0], {})) for family in families()) + FOOT


def row(family: Family, figures: dict[str, float]) -> str:
    both = type(family).other is not Family.other
    videos = "<video>" in family.visual_tokens or (family.layout == "original" and both)
    seen = ", ".join(f"{figures[what]:.1e}" for what in ("logits", "gradients")) if figures else "every bit of weights"
    columns = (
        family.system,
        ", ".join(f"`{name}`" for name in family.model_types),
        "hf, original" if both else family.layout,
        "images, videos" if videos else "images",
        seen,
        family.reference,
        ", ".join(f"`{test}`" for test in named_tests(family)),
        f"`{TRAINED}`",
        f"`{SERVED}`",
    )
    return f"| {' | '.join(columns)} |\n"


def measure() -> dict[str, dict[str, float]]:
    """The worst relative errors of each family that has tiny models, as the tests find them."""
    import pytest

    from tests import test_parity_gradients as gradients
    from tests import test_parity_logits as logits
    from tests.support import parity

    found: dict[str, dict[str, float]] = {}
    for family in families():
        name = family.model_types[0]
        parity.WORST.clear()
        for case in cases(family):
            logits.test_logits_of_each_request_alone(case)
            logits.test_logits_of_all_requests_in_one_batch(case, "packed")
            gradients.test_loss_and_gradients(case)
        if name in OWN_TESTS and name != "llava_llama":
            chosen = ["-k", f"[{name}"] if name in ("qwen", "monkey") else []
            assert pytest.main(["-q", OWN_TESTS[name][0], *chosen]) == 0
        for what in ("logits", "gradients"):
            if worst := [value for label, value in parity.WORST.items() if what in label]:
                found.setdefault(name, {})[what] = float(f"{max(worst):.1e}")
    return found


if __name__ == "__main__":
    file = DOCS / "families.json"
    if "--measure" in sys.argv:
        file.write_text(json.dumps(measure(), indent=1) + "\n")
    (DOCS / "families.md").write_text(page(json.loads(file.read_text())), encoding="utf-8")
