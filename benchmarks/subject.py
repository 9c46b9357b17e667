"""The benchmarked model: one copy of the weights, shared by llava_fast and transformers."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import release
from benchmarks.shapes import SHAPES, build_config, build_processor, write_directory
from llava_fast.families import read_config
from llava_fast.families.llava_names import from_stored, is_skipped
from llava_fast.generation.llava import Llava
from llava_fast.inputs.chat.rendering import builtin_template
from llava_fast.inputs.processor import Processor
from llava_fast.models.fused import merge_linears
from llava_fast.models.quantised import Quantisation, Quantised, put
from llava_fast.models.quantised import plan as quantisation_plan
from llava_fast.ops.quantised_linear.memory import in_huge_pages

BLOCK = (1 << 20) + 7
"""The number of random values that are repeated to fill the weights. It is odd, so that rows of a matrix differ."""


class Subject:
    """The models and processors of a shape (see shapes.py) or of a checkpoint directory in the Hugging Face layout.

    They are created on first use, since preprocessing needs no weights. Raises ValueError for any other name.
    """

    def __init__(
        self,
        model: str,
        layers: int | None,
        dtype: torch.dtype,
        device: str,
        quantisation: Quantisation | None = None,
    ) -> None:
        self.model = model
        self.shape = SHAPES.get(model)
        if self.shape is None and not (Path(model) / "config.json").is_file():
            raise ValueError(
                f"--model {model!r} is neither a shape ({', '.join(SHAPES)}) nor a directory with a config.json"
            )
        self.layers = layers if self.shape is not None and self.shape.real_width else None
        self.dtype = dtype
        self.device = torch.device(device)
        self.quantisation = quantisation  # of llava_fast's model only

    @property
    def label(self) -> str:
        name = self.model if self.shape else Path(self.model).resolve().name
        return f"{name}, {self.layers} layers" if self.layers else name

    @property
    def real_width(self) -> bool:
        """Whether memory or arithmetic bounds the speed rather than launch overhead: decoder width at least 2048."""
        return self.config.decoder.hidden_size >= 2048

    @cached_property
    def directory(self) -> Path:
        """The directory with configuration and processor files."""
        if self.shape is None:
            return Path(self.model)
        self._temporary = TemporaryDirectory()
        write_directory(self.shape, self.layers, Path(self._temporary.name))
        return Path(self._temporary.name)

    @cached_property
    def config(self):
        return read_config(self.directory)[0]

    @cached_property
    def processor(self) -> Processor:
        """llava_fast's processor. Prompts are given verbatim, so its chat template is not used."""
        return Processor(
            geometry=self.config.geometry,
            tokenizer=self.hf_processor.tokenizer,
            image_token_id=self.config.image_token_id,
            template=builtin_template("vicuna_v1"),
            max_rows=self.config.decoder.context_length,
        )

    @cached_property
    def hf_processor(self) -> Any:
        """transformers' processor with its Pillow image processor, whose results llava_fast reproduces exactly. For a
        shape it is built without AutoImageProcessor, which requires torchvision in transformers 5.17."""
        if self.shape is not None:
            return build_processor(self.shape)
        from transformers import AutoImageProcessor, AutoProcessor

        processor = AutoProcessor.from_pretrained(self.directory)
        processor.image_processor = AutoImageProcessor.from_pretrained(self.directory, backend="pil")
        return processor

    @cached_property
    def hf(self) -> nn.Module:
        """transformers' model, which owns the weights."""
        if self.shape is None:
            from transformers import AutoModelForImageTextToText

            model = AutoModelForImageTextToText.from_pretrained(self.directory, dtype=self.dtype).to(self.device)
        else:
            model, block = self._hf_without_weights(), random_block()
            for number, (name, value) in enumerate(model.named_parameters()):
                value.data = in_huge_pages(torch.empty_like(value))  # as `load` places converted weights
                fill(number, name, value, block)
        model.generation_config.eos_token_id = None  # generate exactly the requested number of tokens
        return model.eval()

    @cached_property
    def hf_compiled(self) -> nn.Module:
        """A second transformers model with the same weights and a compiled forward."""
        model = self.hf_twin()
        model.forward = torch.compile(model.forward)
        return model

    def hf_twin(self) -> nn.Module:
        """Return a new transformers model that shares the weights."""
        model = self._hf_without_weights() if self.shape else type(self.hf)(self.hf.config)
        model.load_state_dict(self.hf.state_dict(), assign=True)
        model.generation_config = self.hf.generation_config
        return model.eval().requires_grad_(False)

    @property
    def as_loaded(self) -> Llava:
        """`ours` for suites that answer: on CUDA with merged Linears, as `load` gives it (and then with weights of its
        own)."""
        return merge_linears(self.ours) if self.device.type == "cuda" else self.ours

    @cached_property
    def ours(self) -> Llava:
        """llava_fast's model. Its parameters share the memory of transformers' model unless they are quantised. When a
        quantised shape is built, at most one weight at a time exists in floating point before its quantisation."""
        with torch.device("meta"):
            model = Llava(self.config, self.processor)
        missing = {name for name, _ in model.named_parameters()}
        roundings = {} if self.quantisation is None else quantisation_plan(model, self.quantisation)
        for stored, value in self.weights():
            name = None if is_skipped(stored) else from_stored(stored)
            if name not in missing:
                continue
            missing.remove(name)
            owner, _, leaf = name.rpartition(".")
            if owner in roundings and leaf == "weight":
                put(model, owner, roundings[owner].of(value.detach()), self.dtype)
            else:
                setattr(model.get_submodule(owner), leaf, nn.Parameter(value.data))
        if missing:
            raise ValueError(f"transformers' model has no weights for {', '.join(sorted(missing)[:4])}")
        return model.eval()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (transformers' name, value) of each weight. For a quantised shape, values are generated on demand
        (always the same) and not kept."""
        if self.shape is None or self.quantisation is None or "hf" in self.__dict__:
            yield from self.hf.named_parameters()
            return
        block = random_block()
        for number, (name, shaped) in enumerate(self._hf_without_weights("meta").named_parameters()):
            value = torch.empty_like(shaped, device=self.device, requires_grad=False)
            fill(number, name, value, block)
            yield name, value

    @property
    def weight_bytes(self) -> int:
        if self.quantisation is None:
            return sum(value.nbytes for value in self.hf.parameters())
        return sum(value.nbytes for value in (*self.ours.parameters(), *self.ours.buffers()))

    @property
    def decoder_itemsize(self) -> float:
        """The average bytes per weight of the decoder's matrices, including scales and zero points."""
        if self.quantisation is None:
            return self.dtype.itemsize
        quantised = [module for module in self.ours.decoder.modules() if isinstance(module, Quantised)]
        held = sum(value.nbytes for module in quantised for value in module.buffers(recurse=False))
        return held / sum(math.prod(module.quantised.shape) for module in quantised)

    def close(self) -> None:
        """Free the models and the temporary directory."""
        for part in ("ours", "hf_compiled", "hf", "processor", "hf_processor"):
            self.__dict__.pop(part, None)
        gc.collect()
        release(self.device)
        if "_temporary" in self.__dict__:
            self._temporary.cleanup()

    def _hf_without_weights(self, device: str | None = None) -> nn.Module:
        from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
        from transformers.initialization import no_init_weights

        kind = LlavaNextForConditionalGeneration if self.shape.anyres else LlavaForConditionalGeneration
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with no_init_weights(), torch.device(device or self.device):
                return kind(build_config(self.shape, self.layers))
        finally:
            torch.set_default_dtype(before)


def random_block() -> Tensor:
    """Return normal values that `fill` repeats, because sampling a billion values takes longer than the benchmark."""
    return torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def fill(number: int, name: str, value: Tensor, block: Tensor) -> None:
    """Fill a parameter with random values, depending on its index and name, such that greedy answers vary: linear
    layers preserve the variance of their input, and norm weights are near 1."""
    if value.dim() > 1:
        scale, shift = 1 / math.sqrt(value[0].numel()), 0.0
    else:
        scale, shift = 0.05, float("norm" in name and name.endswith("weight"))
    if "embed_tokens" in name:
        scale = 1.0
    source = (block * scale + shift).roll(1009 * number).to(value.device, value.dtype)
    for part in value.view(-1).split(BLOCK):
        part.copy_(source[: part.numel()])
