"""What transformers' models with a Q-Former need to be compared with: prompts without an image, and the BOS token after
images."""

from __future__ import annotations

import torch
import transformers


class Blip2ForConditionalGeneration(transformers.Blip2ForConditionalGeneration):
    """Text alone is for its language model; transformers' class fails without pixels."""

    def forward(self, pixel_values=None, input_ids=None, **rest):
        if pixel_values is not None:
            return super().forward(pixel_values, input_ids, **rest)
        return self.language_model(input_ids=input_ids, **rest)

    def generate(self, pixel_values=None, **options):
        if pixel_values is not None:
            return super().generate(pixel_values, **options)
        return self.language_model.generate(**options)


def bos_after_images(inputs: dict, image_token: int) -> dict:
    """The same prompt with its BOS token behind the image tokens that follow it, as in transformers' processor."""
    ids = inputs["input_ids"][0].tolist()
    leading = next((number for number, token in enumerate(ids[1:]) if token != image_token), len(ids) - 1)
    moved = ids[1 : leading + 1] + ids[:1] + ids[leading + 1 :]
    return inputs | {"input_ids": torch.tensor([moved])}
