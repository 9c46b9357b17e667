"""Load test of a server with many concurrent clients, some misbehaving. Answers must equal those of `generate`.

    python -m benchmarks.soak                         # 64 clients, 2 minutes, the demo model
    python -m benchmarks.soak MODEL --clients 16 --seconds 30

A client sends valid questions, streamed or not, and at random disconnects during an answer or sends a corrupt image or
an oversize body. The rounding of PyTorch's matrix products depends on the number of rows. Therefore only questions are
used whose answers have no near tie: the log probabilities of the two most likely tokens differ by at least 0.001 at
every position. With --batch-invariant all questions are used. The server listens on loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai
from PIL import Image

from benchmarks import machine
from benchmarks.served import llava_fast_server, running

NEAR = 1e-3
TEXTS = ("What digits are written here?", "hello there", "How many are there? Count them.", "Tell me more about this")


@dataclass
class Question:
    """A question, and its answer by `generate` without other requests."""

    messages: list[dict]
    tokens: int
    answer: str


@dataclass
class Report:
    """Counts of outcomes ("right", "wrong", "left", "refused as it should be", "busy", ...), and seconds."""

    counts: Counter = field(default_factory=Counter)
    whole: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        def spread(seconds: list[float]) -> dict[str, float]:
            return {f"p{p}": round(float(np.percentile(seconds, p)), 4) for p in (50, 95, 99)} if seconds else {}

        times = {"answer_seconds": spread(self.whole), "first_token_seconds": spread(self.first)}
        return {**self.counts, **times, "wrong": self.wrong[:5]}


def picture(seed: int, height: int = 64, width: int = 96) -> str:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def questions(model: Any, number: int, near: float = NEAR, seed: int = 0) -> list[Question]:
    """Return questions about images whose answers have no tie nearer than `near`."""
    dice, found = random.Random(seed), []
    for _ in range(50 * number):
        tokens = dice.choice((4, 16, 48))
        images = [picture(dice.randrange(6)) for _ in range(dice.choice((0, 1, 1, 2)))]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": dice.choice(TEXTS)}]}]
        (alone,) = model.generate({"messages": messages}, max_new_tokens=tokens, logprobs=2)
        if all(each.top[0][1] - each.top[1][1] >= near for each in alone.logprobs):
            found.append(Question(messages, tokens, alone.text))
        if len(found) == number:
            return found
    raise SystemExit(f"only {len(found)} of {number} questions have answers without a near tie")


async def soak(url: str, model: str, asked: list[Question], seconds: float, clients: int, body_limit: int) -> Report:
    """Ask for so long, so many at once."""
    report, ends = Report(), time.monotonic() + seconds
    connections = openai.DefaultAsyncHttpxClient(timeout=120)
    api = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=connections)
    async with api:
        await asyncio.gather(*(_client(api, model, asked, ends, body_limit, report, seed) for seed in range(clients)))
    return report


async def _client(api, model: str, asked: list[Question], ends: float, body_limit: int, report: Report, seed: int):
    dice = random.Random(seed)
    while time.monotonic() < ends:
        question = dice.choice(asked)
        act = dice.choices((_whole, _streamed, _leaves, _broken, _oversize), (8, 8, 3, 1, 1))[0]
        try:
            await act(api, model, question, report, dice, body_limit)
        except openai.RateLimitError as error:
            report.counts["busy"] += 1
            assert int(error.response.headers["retry-after"]) > 0
            await asyncio.sleep(dice.random() * 0.2)


def _check(report: Report, question: Question, text: str, began: float) -> None:
    report.whole.append(time.monotonic() - began)
    report.counts["right" if text == question.answer else "wrong"] += 1
    if text != question.answer:
        report.wrong.append(f"{text!r} is not {question.answer!r}")


def _options(model: str, question: Question) -> dict[str, Any]:
    return {"model": model, "messages": question.messages, "max_tokens": question.tokens, "temperature": 0}


async def _whole(api, model, question, report, dice, body_limit) -> None:
    began = time.monotonic()
    answer = await api.chat.completions.create(**_options(model, question))
    _check(report, question, answer.choices[0].message.content, began)


async def _streamed(api, model, question, report, dice, body_limit) -> None:
    began, text, first = time.monotonic(), "", True
    async for chunk in await api.chat.completions.create(**_options(model, question), stream=True):
        piece = chunk.choices[0].delta.content or ""
        if piece and first:
            report.first.append(time.monotonic() - began)
            first = False
        text += piece
    _check(report, question, text, began)


async def _leaves(api, model, question, report, dice, body_limit) -> None:
    options = {**_options(model, question), "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    if dice.random() < 0.5:
        asking = asyncio.ensure_future(api.chat.completions.create(**options))
        await asyncio.sleep(dice.random() * 0.1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    else:
        stream = await api.chat.completions.create(**options, stream=True)
        for _ in range(dice.randrange(4)):
            await anext(stream.__aiter__(), None)
        await stream.close()
    report.counts["left"] += 1


async def _broken(api, model, question, report, dice, body_limit) -> None:
    cut = picture(1)[: dice.randrange(30, 2000)]
    await _refused(api, report, 400, model=model, messages=_about(cut))


async def _oversize(api, model, question, report, dice, body_limit) -> None:
    await _refused(api, report, 413, model=model, messages=_about(picture(1) + "A" * body_limit))


async def _refused(api, report: Report, status: int, **body: Any) -> None:
    try:
        await api.chat.completions.create(**body)
        report.counts["taken that should not be"] += 1
    except openai.RateLimitError:
        raise
    except openai.APIStatusError as error:
        report.counts["refused as it should be" if error.status_code == status else f"status {error.status_code}"] += 1
    except openai.APIConnectionError:  # the server hung up while an oversize body was still being sent
        report.counts["refused as it should be" if status == 413 else "connection lost"] += 1


def _about(url: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


async def watched(run: Any, memory: Callable[[], int], seconds: float) -> tuple[Any, list[int]]:
    """What `run` returns, and the memory at 8 moments."""
    sizes: list[int] = []

    async def watch() -> None:
        for _ in range(8):
            await asyncio.sleep(seconds / 8)
            sizes.append(memory())

    result, _ = await asyncio.gather(run, watch())
    return result, sizes


def main() -> None:
    import psutil

    import llava_fast
    from llava_fast.demo.run import model_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(model_path()))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--output-json", type=Path)
    chosen = parser.parse_args()
    near = 0.0 if chosen.batch_invariant else NEAR
    asked = questions(llava_fast.load(chosen.model, device="cpu"), chosen.questions, near)
    server = llava_fast_server(chosen.model, "--max-body-mb", "1", *["--batch-invariant"] * chosen.batch_invariant)
    about = {"machine": machine.describe("cpu", 1), "versions": machine.versions(), "commit": machine.commit()}
    with running(server):
        process = psutil.Process(server.process.pid)
        run = soak(server.url, server.model, asked, chosen.seconds, chosen.clients, 1_000_000)
        report, sizes = asyncio.run(watched(run, lambda: process.memory_info().rss, chosen.seconds))
    found = {**report.summary(), "rss_mb": [size >> 20 for size in sizes]}
    result = {"schema": "llava_fast-soak/1", **about, "settings": {**vars(chosen), "output_json": None}, **found}
    print(json.dumps(found, indent=1))
    if chosen.output_json:
        chosen.output_json.write_text(json.dumps(result, indent=1) + "\n")
    grown = sizes[-1] - sizes[2]
    bad = {name for name in report.counts if name not in ("right", "left", "refused as it should be", "busy")}
    if bad or grown > max(40 << 20, sizes[2] // 20):
        sys.exit(f"failed: {bad or ''} grown by {grown >> 20} MB")


if __name__ == "__main__":
    main()
