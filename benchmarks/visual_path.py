"""The visual path of families beyond LLaVA's own, beside transformers: uint8 tiles (there: normalised float32) through
tower and connector to the decoder's inputs, at published widths, with random weights.

    python -m benchmarks.visual_path blip-2,instructblip,idefics3 --layers 4 --output-json results.json

Towers are cut to `--layers`; Q-Formers and connectors are whole. Results are checked before anything is timed, both
sides are timed in turns, and the peak memory is that of one call (see case.py).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

VOCABULARY = 2048
QUESTION = "What is shown in this picture?"


@dataclass(frozen=True)
class Guest:
    """A family: transformers' class and config, its image processor, the decoder's inputs by transformers, and the
    prompt."""

    model: str
    config: Callable[[int, int], Any]
    images: Callable[[], Any]
    encode: Callable[..., Any]
    prompt: str = f"<image>{QUESTION}"


def _text(width: int) -> dict[str, Any]:
    """A decoder of one layer, which does not run."""
    from transformers import LlamaConfig

    heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
    sizes = {"hidden_size": width, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    return LlamaConfig(**sizes, **heads, max_position_embeddings=4096, pad_token_id=0).to_dict()


def _blip(kind: str, width: int) -> Callable[[int, int], Any]:
    def config(layers: int, image: int) -> Any:
        import transformers

        parts = {"vision_config": {"num_hidden_layers": layers}, "qformer_config": {}, "text_config": _text(width)}
        return getattr(transformers, f"{kind}Config")(**parts, num_query_tokens=32, image_token_index=image)

    return config


def _idefics3(layers: int, image: int) -> Any:
    from transformers import Idefics3Config, LlamaConfig

    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 364}
    vision |= {"patch_size": 14, "num_hidden_layers": layers}
    text = LlamaConfig(**{name: value for name, value in _text(4096).items() if name != "model_type"})
    return Idefics3Config(vision_config=vision, text_config=text, image_token_id=image, scale_factor=2)


def _blip_images() -> Any:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    return BlipImageProcessorPil(size={"height": 224, "width": 224})


def _idefics3_images() -> Any:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return Idefics3ImageProcessorPil(size={"longest_edge": 2 * 364}, max_image_size={"longest_edge": 364})


def _blip_encode(hf: Any, input_ids: Any, **given: Any) -> Any:
    embeds = hf.get_input_embeddings()(input_ids)
    features = hf.get_image_features(**given).pooler_output.to(embeds.dtype)
    return embeds.masked_scatter(hf.get_placeholder_mask(input_ids, inputs_embeds=embeds), features)


def _idefics3_encode(hf: Any, input_ids: Any, **given: Any) -> Any:
    import torch

    embeds = hf.get_input_embeddings()(input_ids)
    features = hf.get_image_features(**given).pooler_output  # transformers 5.24: those of each image
    if isinstance(features, (list, tuple)):
        features = torch.cat(list(features))
    return hf.model.inputs_merger(input_ids, embeds, features)


GUESTS = {
    "blip-2": Guest("Blip2ForConditionalGeneration", _blip("Blip2", 2560), _blip_images, _blip_encode),
    "instructblip": Guest(
        "InstructBlipForConditionalGeneration", _blip("InstructBlip", 4096), _blip_images, _blip_encode
    ),
    "idefics3": Guest("Idefics3ForConditionalGeneration", _idefics3, _idefics3_images, _idefics3_encode),
}


def case_of(name: str, layers: int, settings: Any) -> Any:
    """The benchmark case of one family."""
    import numpy as np
    import torch
    import transformers
    from torch import nn
    from transformers.initialization import no_init_weights

    from benchmarks import checks
    from benchmarks.case import Case, Provider
    from benchmarks.floors import encode_floor
    from benchmarks.inputs import describe, inference, photographs, sizes
    from benchmarks.shapes import build_tokenizer
    from benchmarks.subject import fill, random_block
    from llava_fast.families import family_of_config, read_config
    from llava_fast.generation.llava import Llava
    from llava_fast.inputs.chat.rendering import builtin_template
    from llava_fast.inputs.instructions import Instructions
    from llava_fast.inputs.plan.columns import TEXT
    from llava_fast.inputs.processor import Processor

    guest, tokenizer = GUESTS[name], build_tokenizer(VOCABULARY - 64)
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer.add_tokens(["<fake_token_around_image>", "<global-img>", *grid][:64], special_tokens=True)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    with no_init_weights():
        hf = getattr(transformers, guest.model)(guest.config(layers, image_token)).eval()
    block = random_block()
    for number, (stored, value) in enumerate(hf.named_parameters()):
        fill(number, stored, value, block)
    with torch.no_grad():
        for module in hf.modules():
            if isinstance(module, nn.LayerNorm) and module.weight.mean() < 0.5:  # one that `fill` takes for another
                module.weight.add_(1)
    images = guest.images()
    with TemporaryDirectory() as folder:
        hf.config.save_pretrained(folder)
        images.save_pretrained(folder)
        config, _ = read_config(Path(folder))
    family, told = family_of_config(config), None
    if config.projector.reads_text:
        told = Instructions(tokenizer, config.projector.positions, config.projector.vocabulary)
    processor = Processor(
        family.geometry(config, tokenizer),
        tokenizer,
        image_token,
        builtin_template("vicuna_v1"),
        images_before_bos=family.images_before_bos,
        instructions=told,
    )
    with torch.device("meta"):
        ours = Llava(config, processor).eval()
    for stored, value in hf.named_parameters():
        owner, _, leaf = family.names.from_stored(stored).rpartition(".")
        setattr(ours.get_submodule(owner), leaf, nn.Parameter(value.data))

    batches = []
    for number in range(3):
        (picture,) = photographs(settings, number)
        batch = ours.prepare([{"prompt": guest.prompt, "images": [picture]}])
        plan = batch.plan
        ids = np.where(plan.column("source") == TEXT, plan.column("row"), image_token)
        given = dict(images([picture], return_tensors="pt"))
        for extra in ("rows", "cols"):
            given.pop(extra, None)
        if told is not None:
            given["qformer_input_ids"] = torch.from_numpy(plan.column("instruction").astype(np.int64))
            given["qformer_attention_mask"] = torch.ones_like(given["qformer_input_ids"])
        batches.append((batch, {"input_ids": torch.from_numpy(ids.astype(np.int64))[None], **given}))

    runs = {
        "llava_fast": lambda number: ours.inputs_embeds(batches[number % 3][0]),
        "hf-eager": lambda number: guest.encode(hf, **batches[number % 3][1]),
    }
    first = batches[0][0]
    return Case(
        suite="encode",
        model=f"{name}, published widths, {layers} tower layers",
        real_width=True,
        label=describe(settings, first),
        providers=[Provider(side, inference(run), lambda x: x.flatten(0, -2)) for side, run in runs.items()],
        check=checks.close("inputs_embeds", settings.dtype),
        floor=encode_floor(config, sizes(first), 4),
        items=1,
        unit="images",
        weight_bytes=sum(value.nbytes for value in hf.parameters()),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", help=f"Some of {', '.join(GUESTS)}, with commas.")
    parser.add_argument("--layers", type=int, default=4, help="Layers of each tower.")
    parser.add_argument("--image-size", default="1024x768", help="WIDTHxHEIGHT of the photograph.")
    parser.add_argument("--iters", type=int, default=5, help="Timed calls of each side.")
    parser.add_argument("--warmup", type=float, default=0.0, help="Seconds each side runs before it is timed.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output-json", type=Path)
    chosen = parser.parse_args(arguments)
    names = chosen.families.split(",")
    if unknown := [name for name in names if name not in GUESTS]:
        parser.error(f"no family {unknown[0]!r}: choose of {', '.join(GUESTS)}")
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    from benchmarks import machine, report
    from benchmarks.case import Settings, measure

    torch.set_num_threads(chosen.threads)
    width, height = map(int, chosen.image_size.split("x"))
    settings = Settings(image_size=(width, height), threads=chosen.threads, warmup=chosen.warmup, iters=chosen.iters)
    about, versions, commit = machine.describe("cpu", chosen.threads), machine.versions(), machine.commit()
    ceilings = machine.measure_ceilings("cpu", torch.float32)
    rows = []
    for name in names:
        new = measure(case_of(name, chosen.layers, settings), settings, ceilings)
        for row in new:
            row.machine, row.versions = {**about, "ceilings": machine.as_dict(ceilings)}, versions | row.versions
            row.commit, row.date = commit, datetime.now(timezone.utc).strftime("%Y-%m-%d")
        print(report.table(new), flush=True)
        rows += new
    if chosen.output_json is not None:
        report.write_json(rows, chosen.output_json)
    return int(any(report.failed(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
