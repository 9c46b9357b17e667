"""llava_fast's server beside others: requests a second and time to the first token, in one run.

    python -m benchmarks.serving --output-json serving.json      # `transformers serve`; 1, 4 and 16 clients
    python -m benchmarks.serving --against vllm vllm+llava_fast --vllm .venv/vllm/bin/python

The servers run on this machine, one thread each, and are asked in turns; the idle ones do nothing. A round is a
number of questions about digits, each about a picture that was never sent before, streamed, greedy, at most 16 tokens.
Rates are the median of the rounds. Answers are compared: rates are given only if at least 98 of 100 are equal (the rest
are near ties).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openai
from PIL import Image

from benchmarks import machine
from benchmarks.served import Served, llava_fast_server, running, transformers_server, vllm_server, vllm_version

OTHERS = ("transformers serve", "vllm", "vllm+llava_fast")
TOKENS = 16
EQUAL = 0.98


def digit_questions(seed: int = 0) -> Iterator[list[dict]]:
    """Messages about one canvas of digits after another."""
    from llava_fast.demo import canvas, questions

    rng, scans = np.random.default_rng(seed), canvas.split_scans()[1]
    while True:
        file = io.BytesIO()
        Image.fromarray(canvas.compose(rng, scans, count=int(rng.integers(1, canvas.MAX_DIGITS + 1))).image).save(
            file, "PNG"
        )
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        text = questions.ask(rng, questions.KINDS[int(rng.integers(len(questions.KINDS)))])
        picture = {"type": "image_url", "image_url": {"url": url}}
        yield [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]


async def round_of(server: Served, asked: list[list[dict]], clients: int) -> dict[str, Any]:
    """One round: its seconds, times to first tokens, answers."""
    waiting, answers, first = list(enumerate(asked)), {}, []
    api = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)

    async def client() -> None:
        while waiting:
            number, messages = waiting.pop()
            began, text = time.monotonic(), ""
            stream = await api.chat.completions.create(
                model=server.model,
                messages=messages,
                max_tokens=TOKENS,
                temperature=0,
                stream=True,
                extra_body=server.fields,
            )
            async for chunk in stream:
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                if piece and not text:
                    first.append(time.monotonic() - began)
                text += piece
            answers[number] = text.strip()

    async with api:
        began = time.monotonic()
        await asyncio.gather(*(client() for _ in range(clients)))
        return {"seconds": time.monotonic() - began, "first": first, "answers": answers}


async def compare(servers: dict[str, Served], counts: list[int], rounds: int, each: int) -> list[dict[str, Any]]:
    """A row for each number of clients and server."""
    source, rows = digit_questions(), []
    for server in servers.values():
        await round_of(server, [next(source) for _ in range(4)], 2)
    for clients in counts:
        found: dict[str, list[dict]] = {name: [] for name in servers}
        for number in range(rounds):
            asked = [next(source) for _ in range(each * clients)]
            for name in list(servers)[:: 1 if number % 2 else -1]:
                found[name].append(await round_of(servers[name], asked, clients))
        for name, results in found.items():
            others = [
                result for other, each in found.items() if other != name for result in zip(results, each, strict=True)
            ]
            same = [one["answers"][i] == other["answers"][i] for one, other in others for i in one["answers"]]
            first = [seconds for result in results for seconds in result["first"]]
            rows.append(
                {
                    "server": name,
                    "clients": clients,
                    "requests_a_second": round(median(each * clients / result["seconds"] for result in results), 2),
                    "first_token_p50": round(float(np.percentile(first, 50)), 4),
                    "first_token_p95": round(float(np.percentile(first, 95)), 4),
                    "equal": sum(same),
                    "compared": len(same),
                }
            )
    return rows


def main() -> None:
    from llava_fast.demo.run import model_path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(model_path()))
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--against", nargs="+", choices=OTHERS, default=OTHERS[:1])
    parser.add_argument("--vllm", default=".venv/vllm/bin/python", help="The Python of an environment with vLLM.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--each", type=int, default=8, help="Questions of a client in a round.")
    parser.add_argument("--output-json", type=Path)
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    about = {"machine": machine.describe("cpu", 1), "versions": machine.versions(), "commit": machine.commit()}
    if any(name.startswith("vllm") for name in chosen.against):
        about["versions"]["vllm"] = vllm_version(chosen.vllm)
    with contextlib.ExitStack() as stack:
        servers = {"llava_fast": llava_fast_server(chosen.model)}
        stack.enter_context(running(servers["llava_fast"]))
        for name in chosen.against:
            if name == "transformers serve":
                servers[name] = transformers_server(chosen.model)
            else:
                servers[name] = vllm_server(chosen.model, chosen.vllm, name != "vllm")
            stack.enter_context(running(servers[name]))
        counts = [int(count) for count in chosen.clients.split(",")]
        rows = asyncio.run(compare(servers, counts, chosen.rounds, chosen.each))
    for row in rows:
        print(row)
    for name in servers:
        equal, compared = (sum(row[field] for row in rows if row["server"] == name) for field in ("equal", "compared"))
        if equal < EQUAL * compared:
            raise SystemExit(f"{name}: {equal} of {compared} answers are the others', so there is nothing to compare")
    result = {
        "schema": "llava_fast-serving/1",
        **about,
        "settings": {**vars(chosen), "output_json": None},
        "rows": rows,
    }
    if chosen.output_json:
        chosen.output_json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
