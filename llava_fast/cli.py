"""The command line: llava-fast generate | chat | train | plot | data | convert | merge-lora | doctor | demo."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llava_fast.errors import LlavaFastError, RecipeError
from llava_fast.train.data import cli as data_cli
from llava_fast.train.recipes import cli as recipe_cli

app = typer.Typer(
    name="llava-fast",
    help="Run and convert LLaVA vision-language models, fast and exactly. `llava-fast COMMAND --help` has examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_cli.app, name="data")
app.add_typer(recipe_cli.app, name="recipe")
app.command()(recipe_cli.plan)
app.command()(recipe_cli.plot)

Model = Annotated[str, typer.Argument(help="A checkpoint directory (Hugging Face or original layout) or a Hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: CUDA if there is one.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: the checkpoint's (CPU: float32).")
]
Template = Annotated[
    str | None,
    typer.Option(help="Use this built-in chat template, not the checkpoint's: vicuna_v1, llama_2, mistral, ..."),
]
ModelBase = Annotated[str | None, typer.Option(help="The base model, for a LoRA or projector-only directory.")]
MaxNewTokens = Annotated[int, typer.Option(min=0, help="The most tokens an answer may have.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time; above 0 draws.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest tokens that make up this probability.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw among this many likeliest tokens (0: all).")]
Seed = Annotated[int | None, typer.Option(help="Makes draws repeatable.")]
System = Annotated[str | None, typer.Option(help="A system message before the conversation.")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The question. Images go before it unless it has <image> marks.")
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
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")
    ] = False,
    model_base: ModelBase = None,
    chat_template: Template = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Ask one question about images.

    llava-fast generate llava-hf/llava-v1.6-mistral-7b-hf -i photo.jpg -p "What is in this picture?"
    """
    from llava_fast.inputs.chat.messages import with_response_format

    if short:
        prompt = with_response_format(prompt, "short")
    request = _request(prompt, list(image), video, raw, system)
    llava = _load(model, device, dtype, chat_template, model_base)
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
    }
    if json_output:
        answer = llava.generate([request], **options)[0]
        typer.echo(json.dumps({**vars(answer), "usage": vars(answer.usage)}, ensure_ascii=False))
        return
    for piece in llava.stream(request, **options):
        typer.echo(piece, nl=False)
    typer.echo()


@app.command()
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
) -> None:
    """Talk with a model. An image is encoded once, however many questions follow.

    Name an image in a turn with @path: "What is in @cat.jpg?". /reset forgets, /quit (or Ctrl-D) leaves.
    """
    conversation = _load(model, device, dtype, chat_template, model_base).chat(system)
    waiting = list(image)
    typer.echo("Name images with @path. /reset forgets the conversation, /quit leaves.", err=True)
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


RecipeFile = Annotated[Path, typer.Argument(help="A recipe: a YAML file, such as the one above.")]
Changes = Annotated[
    list[str], typer.Option("--set", "-s", help="Change a field: -s optimizer.learning_rate=1e-5; repeatable.")
]
Resume = Annotated[bool, typer.Option(help="Go on from the newest checkpoint in the recipe's output, if there is one.")]


@app.command()
def train(
    recipe: RecipeFile,
    set_: Changes = [],  # noqa: B006
    resume: Resume = True,
) -> None:
    """Train a model on LLaVA-format data, as a recipe says. Killed at any moment, the same command goes on.

    \b
    model: llava-hf/llava-1.5-7b-hf
    output: runs/mine
    trainable:
      - projector
      - decoder
    data:
      sources: [{path: data.json, images: images/}]
    optimizer: {learning_rate: 2e-5}
    batch_size: 128

    One process: llava-fast train recipe.yaml. Eight GPUs: torchrun --nproc-per-node 8 -m llava_fast train recipe.yaml.
    The output holds metrics.jsonl, tensorboard/, checkpoints/ and, at the end, model/.

    A section `dpo` or `kto` sets another objective than the answers' likelihood: preference pairs (see llava-fast dpo
    --help), or answers labelled desirable or undesirable, a line of whose data is

    \b
    {"id": 7, "image": "7.jpg", "prompt": "What is this?", "completion": "A dog.", "label": false}
    """
    import logging

    from llava_fast.train.recipe import load_recipe
    from llava_fast.train.run import train as run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    loaded = load_recipe(recipe, set_)
    typer.echo(f"the trained model is in {run(loaded, resume)}")


@app.command()
def dpo(
    recipe: RecipeFile,
    set_: Changes = [],  # noqa: B006
    resume: Resume = True,
) -> None:
    """Teach a model which of two answers is preferred (DPO): `train` for a recipe that must have a section `dpo`.

    \b
    model: llava-hf/LLaVA-NeXT-Video-7B-hf
    output: runs/preferred
    trainable:
      - projector
      - decoder
    dpo: {beta: 0.1}
    data:
      sources: [{path: pairs.jsonl, images: frames/}]
    optimizer: {learning_rate: 5e-7, schedule: linear, warmup: 0.1}
    batch_size: 128

    A line of pairs.jsonl, with "image" or "video", or neither:

    \b
    {"id": 7, "image": "7.jpg", "prompt": "What is this?", "chosen": "A red cup.", "rejected": "A dog."}

    The starting model's log-probabilities are computed first and kept in the output's references/. Watch reward_margin
    and reward_accuracy in metrics.jsonl go up.
    """
    import logging

    from llava_fast.train.recipe import load_recipe
    from llava_fast.train.run import train as run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    loaded = load_recipe(recipe, set_)
    if loaded.dpo is None:
        raise RecipeError("the recipe has no section `dpo`: add one (`dpo: {beta: 0.1}`), or run `llava-fast train`")
    typer.echo(f"the trained model is in {run(loaded, resume)}")


@app.command()
def convert(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The directory to write; it must not exist yet, or be empty.")],
    layout: Annotated[
        Literal["hf", "original"], typer.Option(help="hf (transformers) or original (the LLaVA repositories').")
    ] = "hf",
    dtype: Dtype = None,
    model_base: ModelBase = None,
) -> None:
    """Rewrite a checkpoint in the other layout; answers stay the same at every image size.

    llava-fast convert liuhaotian/llava-v1.5-7b ./llava-1.5-7b-hf --layout hf
    """
    from llava_fast.checkpoints.save import save

    llava = _load(model, "cpu", dtype or "auto", None, model_base)
    save(llava, output, layout=layout)
    typer.echo(f"wrote {output} in the {layout} layout")


@app.command("merge-lora")
def merge_lora(
    adapter: Annotated[str, typer.Argument(help="A directory with adapter_config.json, or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="The directory to write; it must not exist yet, or be empty.")],
    model_base: Annotated[
        str | None, typer.Option(help="The model that the adapter was trained on. Default: the one that it names.")
    ] = None,
    layout: Annotated[
        Literal["hf", "original"] | None, typer.Option(help="As for convert. Default: the model's own.")
    ] = None,
    dtype: Dtype = None,
    chat_template: Template = None,
) -> None:
    """Write a whole model from an adapter and its base: LoRA as W + alpha / rank * B @ A, rounded once.

    DoRA, PiSSA and other adapters are merged by PEFT, or refused by name.

    \b
    llava-fast merge-lora runs/mine/adapter ./mine --model-base llava-hf/llava-1.5-7b-hf
    llava-fast merge-lora liuhaotian/llava-v1.5-7b-lora ./merged --model-base lmsys/vicuna-7b-v1.5 --layout hf

    A training with `lora` has already written its merged model, in the output's model/.
    """
    from llava_fast.checkpoints.adapters import check_adapter
    from llava_fast.checkpoints.save import save

    check_adapter(adapter)
    llava = _load(adapter, "cpu", dtype or "auto", chat_template, model_base)
    layout = layout or llava.config.layout
    save(llava, output, layout=layout)
    typer.echo(f"wrote {output} in the {layout} layout")


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face checkpoint: say what accelerate would replace in it.")
    ] = None,
) -> None:
    """Say what this machine has, which implementation each op would use here and why, and what accelerate replaces.

    llava-fast doctor --model llava-hf/llava-v1.6-mistral-7b-hf
    """
    from llava_fast.doctor import report

    typer.echo(report(model))


@app.command()
def demo(
    image: Annotated[Path | None, typer.Option(help="Read the digits of your own picture instead.")] = None,
    question: Annotated[str, typer.Option(help="What to ask of your own picture.")] = "What digits are written here?",
    seed: Annotated[int, typer.Option(help="Which held-out canvas to compose.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the composed picture is saved.")] = Path("llava_fast_demo.png"),
    compare: Annotated[bool, typer.Option(help="Time transformers on the same weights beside it.")] = True,
) -> None:
    """Open a picture of handwritten digits, ask a small trained LLaVA-NeXT about it, and time each stage.

    The model (a few MB) ships with the package and was trained in examples/digits.
    """
    from llava_fast.demo.run import run_demo

    run_demo(image, question, seed, output, compare)


def main() -> None:
    """Entry point: errors the package raises on purpose become one line and exit code 1."""
    try:
        app()
    except LlavaFastError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def _load(model: str, device: str | None, dtype: str | None, chat_template: str | None, model_base: str | None) -> Any:
    from llava_fast.api import load

    return load(model, device=device, dtype=dtype, chat_template=chat_template, model_base=model_base)


def _request(prompt: str, images: list[str], video: Path | None, raw: bool, system: str | None) -> dict:
    """One request from the command line's parts; items that the prompt does not place come first."""
    items = [("<image>", len(images)), ("<video>", int(video is not None))]
    marks = "".join(f"{mark}\n" * count for mark, count in items if mark not in prompt)
    request: dict[str, Any] = {"images": images}
    if video is not None:
        request["video"] = str(video)
    if raw:
        return {"prompt": marks + prompt, **request}
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": marks + prompt}], **request}


def _named_images(line: str) -> tuple[str, list[str]]:
    """Split a chat line into its text and the images it names with @path. An @word that looks like no path stays."""
    named = [name for name in re.findall(r"(?<!\S)@(\S+)", line) if Path(name).exists() or "/" in name or "." in name]
    for name in named:
        line = line.replace(f"@{name}", "", 1)
    return line.strip(), named
