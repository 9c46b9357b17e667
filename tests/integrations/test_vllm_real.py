"""vLLM with this package's visual half, in vLLM itself: its tokens against stock vLLM's and this engine's.

`make test-vllm` runs this in an environment of its own; elsewhere it is skipped. One process of vLLM at a time, one
device each: tensor parallel of more than one is not tested.
"""

import importlib.util
import json

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

from transformers import LlamaConfig, MistralConfig, Qwen2Config

import llava_fast
from llava_fast.demo import canvas, questions
from llava_fast.demo.run import model_path
from llava_fast.families import family_of_config
from tests.support import tiny
from tests.support.vllm_process import Job, answers

HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}  # vLLM on a CPU: heads of 32 or more
CASES = {
    "llava": tiny.Case("llava", LlamaConfig, HEADS, tile=48),
    "llava_next": tiny.Case("llava_next", MistralConfig, HEADS | {"head_dim": 32}),
    "llava_next_video": tiny.Case(  # an even grid: of an odd one vLLM's own counts more rows than its pooling makes
        "llava_next_video",
        LlamaConfig,
        HEADS,
        options={"spatial_pool_mode": "average"},
        tile=64,
        pinpoints=tiny._grid(64, 2),
    ),
    "llava_onevision": tiny.Case(
        "llava_onevision",
        Qwen2Config,
        HEADS,
        options={"vision_aspect_ratio": "anyres_max_9", "tie_word_embeddings": True},
        pinpoints=tiny._grid(56, 4),
    ),
}
TOKENS = 16


def requests_of(kind: str) -> list[dict]:
    """Pictures of ordinary and odd shapes, several in a prompt, a video, and text alone."""
    side = CASES[kind].tile  # torchvision, which stock vLLM needs for videos, resizes otherwise than Pillow
    video = {
        "prompt": "hello <video> the hello",
        "video": np.stack([tiny.picture(side, side, seed) for seed in range(3)]),
    }
    if kind == "llava_next_video":  # vLLM takes no images for it
        return [video, {"prompt": "hello the hello"}, video | {"prompt": "<video>\nthe"}]
    sizes = [(60, 90), (200, 31), (31, 200), (333, 97), (224, 224)]
    shown = [
        {"prompt": f"hello <image> the {number}", "images": [tiny.picture(*size)]} for number, size in enumerate(sizes)
    ]
    several = {"prompt": "the <image> hello <image>", "images": [tiny.picture(70, 50), tiny.picture(50, 170)]}
    text = {"prompt": "hello the hello"}
    return [*shown, several, text] + ([video] if kind == "llava_onevision" else [])


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """{kind: (stock vLLM's tokens, the plugin's, this engine's)}, and what the plugin's processes wrote to stderr."""
    folder = tmp_path_factory.mktemp("vllm")
    jobs, own = [], []
    for kind, case in CASES.items():
        path, requests = folder / kind, requests_of(kind)
        tiny.save(
            case, tiny.hf_model(case), folder / "transformers" / kind
        )  # whose towers' names vLLM's own cannot read
        model = llava_fast.load(folder / "transformers" / kind)
        llava_fast.save(model, path)
        for file, content in family_of_config(model.config).processor_files(model.config).items():
            if not (path / file).exists():
                (path / file).write_text(json.dumps(content))
        # So few rows a step that prompts come in several chunks. (vLLM's own OneVision takes no picture of more rows.)
        rows = 640 if kind == "llava_onevision" else 64
        jobs.append(Job(str(path), requests, TOKENS, rounds=2, options={"max_num_batched_tokens": rows}))
        own.append([one.token_ids for one in model.generate(requests, max_new_tokens=TOKENS, ignore_eos=True)])
    asked = demo_questions()
    jobs.append(Job(str(model_path()), asked, TOKENS))
    own.append(
        [one.token_ids for one in llava_fast.load(model_path()).generate(asked, max_new_tokens=TOKENS, ignore_eos=True)]
    )
    stock, _ = answers(jobs, False, folder)
    mine, told = answers(jobs, True, folder)
    return dict(zip([*CASES, "demo"], zip(stock, mine, own, strict=True), strict=True)), told


def demo_questions() -> list[dict]:
    """Twelve questions about canvases of digits, with the demo model's chat template."""
    model = llava_fast.load(model_path())
    rng, scans = np.random.default_rng(0), canvas.split_scans()[1]
    asked = []
    for number in range(12):
        image = canvas.compose(rng, scans, count=int(rng.integers(1, canvas.MAX_DIGITS + 1))).image
        text = questions.ask(rng, questions.KINDS[number % len(questions.KINDS)])
        asked.append(
            {
                "prompt": model.processor.template.render([{"role": "user", "content": f"<image>\n{text}"}]),
                "images": [image],
            }
        )
    return asked


@pytest.mark.parametrize("kind", [*CASES, "demo"])
def test_the_plugin_says_what_stock_vllm_says(served, kind):
    stock, mine, _ = served[0][kind]
    assert mine.rounds == stock.rounds


@pytest.mark.parametrize("kind", [*CASES, "demo"])
def test_the_plugin_says_what_this_engine_says(served, kind):
    _, mine, own = served[0][kind]
    several = [len(request.get("images", ())) > 1 for request in requests_of(kind)] if kind == "llava_onevision" else []
    # vLLM cuts each of several images on its own; transformers, and this engine, make one tile of each for OneVision.
    alike = [number for number in range(len(own)) if not (several and several[number])]
    for made in mine.rounds:
        assert [made[number] for number in alike] == [own[number] for number in alike]


@pytest.mark.parametrize("kind", [*CASES, "demo"])
def test_each_was_served_by_the_class_that_is_meant(served, kind):
    """Else stock vLLM would have been compared with itself."""
    stock, mine, _ = served[0][kind]
    assert stock.served_by.startswith("vllm.")
    assert mine.served_by == "llava_fast.integrations.vllm.models"
    assert "vLLM's own class" not in served[1]
