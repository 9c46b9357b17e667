"""From tiles to the decoder's inputs: vision tower, projector, and merging with the text rows.

llava_fast starts from uint8 tiles, transformers from the normalised float tensor of its processor. The side
"llava_fast-graphs" (CUDA only) replays llava_fast's encoding as CUDA graphs (models.encode_graphs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks import checks
from benchmarks.case import GRAPHS, Case, Provider, Settings
from benchmarks.floors import encode_floor
from benchmarks.inputs import Prepared, describe, inference, prepared, sizes
from benchmarks.subject import Subject
from llava_fast.models.encode_graphs import EncodeGraphs
from llava_fast.models.vlm import LlavaModel


def cases(subject: Subject, settings: Settings) -> Iterator[Case]:
    batches = prepared(subject, settings)
    model = subject.ours
    providers = {
        "llava_fast": lambda: lambda i: model.inputs_embeds(batches[i % len(batches)].ours),
        GRAPHS: lambda: _graphs(model, batches),
        "hf-eager": lambda: lambda i: hf_encode(subject.hf, **batches[i % len(batches)].hf),
        "hf-compile": lambda: _compiled(subject, batches),
    }
    yield Case(
        suite="encode",
        model=subject.label,
        real_width=subject.real_width,
        label=describe(settings, batches[0].ours),
        providers=[_provider(name, inference(providers[name]())) for name in settings.backends],
        check=checks.close("inputs_embeds", settings.dtype),
        floor=encode_floor(subject.config, sizes(batches[0].ours), subject.dtype.itemsize),
        items=settings.batch_size,
        unit="images",
        weight_bytes=subject.weight_bytes,
    )


def _provider(name: str, run: Callable[[int], Tensor]) -> Provider:
    # A replay overwrites the previous result. Its memory was allocated at capture, so its own peak is meaningless.
    if name == GRAPHS:
        return Provider(name, run, torch.clone, compiles=True, peak=lambda: None)
    return Provider(name, run, lambda x: x.flatten(0, -2), compiles=name == "hf-compile")


def hf_encode(hf: nn.Module, input_ids: Tensor, pixel_values: Tensor, **rest: Tensor) -> Tensor:
    """Run the part of transformers' LlavaModel and LlavaNextModel before the decoder: [sequences, rows, width]."""
    model = hf.model
    embeds = model.get_input_embeddings()(input_ids)
    rest.pop("attention_mask", None)
    features = torch.cat(model.get_image_features(pixel_values, **rest).pooler_output)
    mask = model.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=features)
    return embeds.masked_scatter(mask, features.to(embeds.dtype))


def _graphs(model: LlavaModel, batches: list[Prepared]) -> Callable[[int], Tensor]:
    graphs = EncodeGraphs(model)
    return lambda i: graphs(batches[i % len(batches)].ours)


def _compiled(subject: Subject, batches: list):
    encode = torch.compile(hf_encode)
    return lambda i: encode(subject.hf_compiled, **batches[i % len(batches)].hf)
