"""Tiles to the decoder's inputs: vision tower, projector, and packing among the text rows.

llava_fast starts from uint8 tiles, transformers from the normalised float tensor its processor made. On CUDA one more
side, "llava_fast, graphs", replays the same from CUDA graphs (models.encode_graphs).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks import checks
from benchmarks.case import Case, Provider, Settings
from benchmarks.floors import encode_floor
from benchmarks.inputs import describe, inference, prepared, sizes
from benchmarks.subject import Subject
from llava_fast.models.encode_graphs import EncodeGraphs


def cases(subject: Subject, settings: Settings) -> Iterator[Case]:
    batches = prepared(subject, settings)
    model = subject.ours
    providers = {
        "llava_fast": lambda: lambda i: model.inputs_embeds(batches[i % len(batches)].ours),
        "hf-eager": lambda: lambda i: hf_encode(subject.hf, **batches[i % len(batches)].hf),
        "hf-compile": lambda: _compiled(subject, batches),
    }
    sides = [
        Provider(name, inference(providers[name]()), lambda x: x.flatten(0, -2), compiles=name == "hf-compile")
        for name in settings.backends
    ]
    if subject.device.type == "cuda" and "llava_fast" in settings.backends:
        graphs = EncodeGraphs(model)
        replay = inference(lambda i: graphs(batches[i % len(batches)].ours))
        # What a replay works on was taken when the graph was captured, so a replay's own peak says nothing.
        sides.append(Provider("llava_fast, graphs", replay, torch.clone, compiles=True, peak=lambda: None))
    yield Case(
        suite="encode",
        model=subject.label,
        real_width=subject.real_width,
        label=describe(settings, batches[0].ours),
        providers=sides,
        check=checks.close("inputs_embeds", settings.dtype),
        floor=encode_floor(subject.config, sizes(batches[0].ours), subject.dtype.itemsize),
        items=settings.batch_size,
        unit="images",
        weight_bytes=subject.weight_bytes,
    )


def hf_encode(hf: nn.Module, input_ids: Tensor, pixel_values: Tensor, **rest: Tensor) -> Tensor:
    """What transformers' LlavaModel and LlavaNextModel do before their language model: [sequences, rows, width]."""
    model = hf.model
    embeds = model.get_input_embeddings()(input_ids)
    rest.pop("attention_mask", None)
    features = torch.cat(model.get_image_features(pixel_values, **rest).pooler_output)
    mask = model.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=features)
    return embeds.masked_scatter(mask, features.to(embeds.dtype))


def _compiled(subject: Subject, batches: list):
    encode = torch.compile(hf_encode)
    return lambda i: encode(subject.hf_compiled, **batches[i % len(batches)].hf)
