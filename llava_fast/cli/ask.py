"""`llava-fast generate` and `llava-fast chat`: ask a model about images."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_fast.cli.options import Device, Dtype, KvCache, Model, ModelBase, Precision, Quantize, Template, load_model
from llava_fast.errors import LlavaFastError, RequestError

MaxNewTokens = Annotated[int, typer.Option(min=0, help="Maximum number of answer tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: greedy decoding; above 0: sampling.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens with this total probability.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from this many likeliest tokens (0: all).")]
Seed = Annotated[int | None, typer.Option(help="Makes draws repeatable.")]
System = Annotated[str | None, typer.Option(help="A system message before the conversation.")]


def generate(
    model: Model,
    prompt: Annotated[
        str,
        typer.Option("--prompt", "-p", help="The question. Images go before it unless it has <image> placeholders."),
    ],
    image: Annotated[list[str], typer.Option("--image", "-i", help="An image file; repeat for several.")] = [],  # noqa: B006
    video: Annotated[Path | None, typer.Option(help="A video file (needs PyAV).")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the prompt verbatim, without the chat template.")] = False,
    short: Annotated[
        bool, typer.Option("--short", help="Ask for a single word or phrase, as LLaVA-1.5's benchmarks do.")
    ] = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Annotated[list[str], typer.Option(help="A string that ends the answer; repeat for several.")] = [],  # noqa: B006
    candidate: Annotated[
        list[str],
        typer.Option(help="Generate nothing: rank this candidate answer by its likelihood; repeat for several."),
    ] = [],  # noqa: B006
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")
    ] = False,
    model_base: ModelBase = None,
    chat_template: Template = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    kv_cache: KvCache = None,
    precision: Precision = None,
) -> None:
    """Ask one question about images.

    \b
    llava-fast generate llava-hf/llava-v1.6-mistral-7b-hf -i photo.jpg -p "What is in this picture?"
    llava-fast generate llava-hf/llava-1.5-7b-hf -i photo.jpg -p "Which animal?" --candidate cat --candidate dog

    With candidates, each line is the sum of a candidate's log-probabilities, their mean and the candidate, likeliest
    first.
    """
    from llava_fast.inputs.chat.messages import with_response_format

    if short:
        prompt = with_response_format(prompt, "short")
    request = _request(prompt, list(image), video, raw, system)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
    }
    usual: dict[str, Any] = {
        "max_new_tokens": 128,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": None,
        "stop": [],
    }
    if candidate and options != usual:
        raise RequestError("with --candidate nothing is generated: leave the options of sampling out")
    loaded = {"quantize": quantize, "kv_cache": kv_cache, "precision": precision}
    llava = load_model(model, device, dtype, chat_template, model_base, **loaded)
    if candidate:
        ranked = llava.rank(request, candidate)
        if json_output:
            means = [{**vars(each), "mean_log_likelihood": each.mean_log_likelihood} for each in ranked]
            typer.echo(json.dumps({"candidates": means}, ensure_ascii=False))
            return
        for each in ranked:
            typer.echo(f"{each.log_likelihood:10.4f} {each.mean_log_likelihood:10.4f}  {each.text}")
        return
    if json_output:
        answer = llava.generate([request], **options)[0]
        fields = {name: value for name, value in vars(answer).items() if name != "logprobs"}
        typer.echo(json.dumps({**fields, "usage": vars(answer.usage)}, ensure_ascii=False))
        return
    for piece in llava.stream(request, **options):
        typer.echo(piece, nl=False)
    typer.echo()


def chat(
    model: Model,
    image: Annotated[
        list[str], typer.Option("--image", "-i", help="Images of the first turn; repeat for several.")
    ] = [],  # noqa: B006
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    model_base: ModelBase = None,
    chat_template: Template = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    kv_cache: KvCache = None,
    precision: Precision = None,
) -> None:
    """Chat with a model about images. Each image is encoded only once per conversation.

    Add an image to a turn with @path: "What is in @cat.jpg?". /reset starts over, /quit (or Ctrl-D) exits.
    """
    conversation = load_model(
        model, device, dtype, chat_template, model_base, quantize=quantize, kv_cache=kv_cache, precision=precision
    ).chat(system)
    waiting = list(image)
    typer.echo("Add images with @path. /reset starts a new conversation, /quit exits.", err=True)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo(err=True)
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            conversation.reset()
            continue
        if not line:
            continue
        text, named = _named_images(line)
        try:
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
            answer = conversation.send(text, [*waiting, *named], seed=seed, **options)
        except LlavaFastError as error:
            typer.echo(f"error: {error}", err=True)
            continue
        waiting = []
        typer.echo(answer.text)


def _request(prompt: str, images: list[str], video: Path | None, raw: bool, system: str | None) -> dict:
    """A request from the command line's arguments; images and videos without a placeholder come first."""
    items = [("<image>", len(images)), ("<video>", int(video is not None))]
    placeholders = "".join(f"{placeholder}\n" * count for placeholder, count in items if placeholder not in prompt)
    request: dict[str, Any] = {"images": images}
    if video is not None:
        request["video"] = str(video)
    if raw:
        return {"prompt": placeholders + prompt, **request}
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": placeholders + prompt}], **request}


def _named_images(line: str) -> tuple[str, list[str]]:
    """Split a chat line into its text and the images given as @path. An @word that does not look like a path is
    text."""
    named = [name for name in re.findall(r"(?<!\S)@(\S+)", line) if Path(name).exists() or "/" in name or "." in name]
    for name in named:
        line = line.replace(f"@{name}", "", 1)
    return line.strip(), named
