"""Model classes for lmms-eval: `--model llava_fast --model_args pretrained=PATH,dtype=bfloat16`.

lmms-eval finds them through this package's entry point (`manifest`): `LlavaFastChat` for tasks that give messages (its
default), and `LlavaFast` for tasks that give text and images (`--force_simple`), among them loglikelihood and
multiple-choice tasks. Nothing in llava_fast imports this file. It needs lmms-eval, which llava_fast does not install.

Tested with lmms-eval 0.7.3 (test_lmms_eval_real.py) and on a stub of its interface (api/model.py, api/instance.py,
models/registry_v2.py). Only one process is supported: data-parallel runs raise RequestError.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from tqdm import tqdm

from llava_fast.api import load
from llava_fast.errors import RequestError
from llava_fast.generation.ranking import score_candidates
from llava_fast.inputs.options import ProcessorOptions

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
except ImportError:  # lmms-eval before 0.7 expects plain texts without token counts
    GenerationResult = None

logger = logging.getLogger("llava_fast.integrations")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp")
"""Suffixes of image files; lmms-eval treats any other path as a video."""
WITHOUT_EFFECT = {"do_sample", "num_beams", "use_cache", "image_aspect_ratio"}
"""Settings of a task that are handled elsewhere or decided by the checkpoint."""


def manifest():
    """The manifest that lmms-eval's registry reads from the entry point group "lmms_eval.models"."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("llava_fast", f"{__name__}.LlavaFast", f"{__name__}.LlavaFastChat")


@register_model("llava_fast")
class LlavaFast(lmms):
    """A checkpoint that `llava_fast.load` reads, for tasks that give text and images.

    pretrained     a Hugging Face or original LLaVA checkpoint.
    device, dtype, chat_template   as in `llava_fast.load`; video_frames as in ProcessorOptions.
    batch_size     requests per batch; an answer does not depend on the others in its batch. Of loglikelihoods with one
                   question and document, which run it once, all count as one.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        chat_template: str | None = None,
        video_frames: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        self.pretrained = pretrained  # names lmms-eval's cache
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RequestError("llava_fast evaluates in one process: start lmms-eval without accelerate or torchrun")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise RequestError(f"batch_size is a whole number above 0, not {batch_size!r}")
        self.batch_size = int(batch_size)
        options = ProcessorOptions(video_frames=video_frames)
        self.model = load(pretrained, device=device, dtype=dtype, chat_template=chat_template, processor=options)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    def generate_until(self, requests: list) -> list:
        """The answers to lmms-eval Instances, in order: GenerationResults with token counts of the prompt (visual ones
        included) and answer, or plain texts if lmms-eval has no such class. A task's "until" ends an answer and is not
        part of it; an empty text in it has no effect. Raises RequestError or ImageError naming the sample, and
        RequestError for beam search."""
        read = [self._read(instance.args) for instance in requests]
        answers: list[Any] = [None] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, (_, options) in enumerate(read):
            alike.setdefault(repr(sorted(options.items())), []).append(number)
        with tqdm(total=len(requests), desc="llava_fast") as progress:
            for numbers in alike.values():
                for first in range(0, len(numbers), self.batch_size):
                    part = numbers[first : first + self.batch_size]
                    made = self.model.generate([read[number][0] for number in part], **read[part[0]][1])
                    for number, generation in zip(part, made, strict=True):
                        usage = generation.usage
                        answers[number] = _result(generation.text, usage.prompt_tokens, usage.completion_tokens)
                        context, settings = requests[number].args[0], read[number][1]
                        self.cache_hook.add_partial("generate_until", (context, settings), generation.text)
                    progress.update(len(part))
        return answers

    def loglikelihood(self, requests: list) -> list:
        """For each Instance the pair (mean loss of the target's tokens, end of turn included; whether greedy decoding
        gives them), as the text of a GenerationResult, since lmms-eval 0.7 turns a bare pair into a string. Like here,
        lmms-eval's own models return a loss under this name, and its tasks choose the smallest."""
        found: list = [None] * len(requests)
        alike: dict[tuple, list[int]] = {}
        for number, instance in enumerate(requests):
            alike.setdefault((instance.args[0], *instance.args[3:]), []).append(number)
        groups = list(alike.values())
        for first in tqdm(range(0, len(groups), self.batch_size), desc="llava_fast"):
            part = groups[first : first + self.batch_size]
            read = [self._with_targets([requests[number].args for number in numbers]) for numbers in part]
            asked, targets = [request for request, _ in read], [texts for _, texts in read]
            scored = score_candidates(self.model, asked, targets, end_of_turn=True)
            for numbers, candidates in zip(part, scored, strict=True):
                for number, each in zip(numbers, candidates, strict=True):
                    pair = -each.mean_log_likelihood, each.is_greedy
                    found[number] = _result(pair, each.prompt_tokens, len(each.token_ids))
        return found

    def generate_until_multi_round(self, requests: list) -> list[str]:
        raise NotImplementedError("llava_fast does not support lmms-eval's multi-round tasks")

    def _read(self, args: tuple) -> tuple[dict, dict]:
        """(request, options of generate) of a generate_until Instance."""
        context, settings, doc_to_visual, doc_id, task, split = args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        return _request([{"role": "user", "content": context}], visuals, args[3:]), _options(settings)

    def _with_targets(self, alike: list[tuple]) -> tuple[dict, list[str]]:
        """(request, targets) of loglikelihood Instances with the same context and document."""
        if len(alike[0]) != 6:
            raise RequestError("a loglikelihood without a document (acc_mutual_info) is not supported")
        context, _, doc_to_visual, doc_id, task, split = alike[0]
        doc = self.task_dict[task][split][doc_id]
        targets = (args[1] for args in alike)
        texts = [str(target if isinstance(target, str) else target(doc)).strip() for target in targets]
        return _request([{"role": "user", "content": context}], doc_to_visual(doc), alike[0][3:]), texts


@register_model("llava_fast_chat")
class LlavaFastChat(LlavaFast):
    """LlavaFast for tasks that give messages."""

    is_simple = False

    def _read(self, args: tuple) -> tuple[dict, dict]:
        _, doc_to_messages, settings, doc_id, task, split = args
        turns, visuals = [], []
        for message in doc_to_messages(self.task_dict[task][split][doc_id]):
            content = message["content"]
            if not isinstance(content, str):
                visuals += [item["url"] for item in content if item["type"] != "text"]
                content = [_item(item) for item in content]
            turns.append({"role": message["role"], "content": content})
        return _request(turns, visuals, args[3:]), _options(settings)


def _result(answer: Any, input_tokens: int, output_tokens: int) -> Any:
    """An answer for lmms-eval: with token counts if it has a class for them."""
    if GenerationResult is None:
        return answer
    return GenerationResult(answer, TokenCounts(input_tokens, output_tokens))


def _item(item: dict) -> dict:
    """A message's item in the engine's format; its image or video is passed separately."""
    if item["type"] not in ("text", "image", "video"):
        raise RequestError(f"llava_fast reads text, images and videos, not {item['type']!r}")
    return item if item["type"] == "text" else {"type": item["type"]}


def _request(turns: list[dict], visuals: Any, place: tuple) -> dict:
    """An engine request, with task, split and document as its id. If no turn has a placeholder, images and videos are
    put before the first turn's text."""
    doc_id, task, split = place
    shown = list(_flat(visuals))
    videos = [each for each in shown if isinstance(each, str) and not each.lower().endswith(PICTURES)]
    images = [each for each in shown if not any(each is video for video in videos)]
    if len(videos) > 1:
        raise RequestError(f"request {task}/{split}/{doc_id}: {len(videos)} videos; at most one is supported")
    first = turns[0]["content"]
    if isinstance(first, str):
        kinds = [("image", len(images)), ("video", len(videos))]
        items = [{"type": kind} for kind, count in kinds for _ in range(count) if f"<{kind}>" not in first]
        turns = [{**turns[0], "content": [*items, {"type": "text", "text": first}]}, *turns[1:]]
    request: dict[str, Any] = {"messages": turns, "images": images, "id": f"{task}/{split}/{doc_id}"}
    return request | ({"video": videos[0]} if videos else {})


def _flat(visuals: Any) -> Iterable:
    """Images and paths from nested lists; None gives none."""
    if isinstance(visuals, (list, tuple)):
        for each in visuals:
            yield from _flat(each)
    elif visuals is not None:
        yield visuals


def _options(settings: dict) -> dict[str, Any]:
    """Convert a task's generation settings to options of `Llava.generate`."""
    if (settings.get("num_beams") or 1) > 1:
        raise RequestError(f"beam search (num_beams={settings['num_beams']}) is not supported: set num_beams=1")
    temperature = settings.get("temperature")
    if temperature is None:
        temperature = 1.0 if settings.get("do_sample") else 0.0
    until = settings.get("until")
    options = {
        "max_new_tokens": settings.get("max_new_tokens", settings.get("max_gen_toks", 1024)),
        "temperature": 0.0 if settings.get("do_sample") is False else float(temperature),
        "stop": [text for text in until if text] if isinstance(until, (list, tuple)) else until or None,
    }
    names = {"top_p", "top_k", "repetition_penalty", "seed"}
    options |= {name: settings[name] for name in names if settings.get(name) is not None}
    unknown = set(settings) - WITHOUT_EFFECT - names - {"max_new_tokens", "max_gen_toks", "temperature", "until"}
    if unknown:
        logger.warning("generation settings %s have no effect here", sorted(unknown))
    return options
