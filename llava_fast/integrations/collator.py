"""`Collator`: makes batches for a transformers LLaVA from samples of text and images, with labels and plan.

The whole conversation is tokenised once, and a token is supervised if it ends inside an answer. A Collator holds a
processor and a config but no model, so it can run in DataLoader workers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info

from llava_fast.accelerated import shipped_plan, uint8_pixels
from llava_fast.errors import LlavaFastError, RequestError
from llava_fast.inputs.chat.messages import IMAGE_PLACEHOLDER
from llava_fast.inputs.chat.rendering import ChatTemplate, Segment, builtin_template, checkpoint_template
from llava_fast.inputs.labels import offsets_before_expansion, supervised_tokens
from llava_fast.inputs.pictures.reading import open_image
from llava_fast.inputs.plan.columns import IGNORE
from llava_fast.inputs.requests import render_request
from llava_fast.orphans import end_with_parent

PIXELS = (*uint8_pixels.NAMES.values(), *uint8_pixels.NAMES)
FEATURES = ("input_ids", "attention_mask", "labels", *PIXELS, "image_sizes", "batch_num_images")


class Collator:
    """A collator for HF Trainer or a DataLoader: `Collator(processor, model)(samples)`.

    processor     a LLaVA processor of transformers, or a FastProcessor.
    model         the model, or its config.
    labels        True: answers are supervised. False: prompts for generate; answers are left out.
    end           text appended to the answer of a sample with a "prompt". Default: the tokenizer's end of sequence; ""
                  for none. (In messages the chat template ends a turn.)
    chat_template name of a built-in template (see inputs.chat.formats) to use instead of the processor's.
    padding_side  "left" or "right". Default: the tokenizer's; "left" without labels.
    plan          True: the batch includes its plan as int32 tensors `llava_plan_*`, so that an accelerated model's
                  forward needs no synchronisation with the device. False: for a model that is not accelerated, or for
                  nn.DataParallel.

    A sample is one of
      {"messages": [...], "images": [...]}  OpenAI format, for the chat template; assistant messages are supervised
      {"prompt": str, "images": [...], "answer": str}  the prompt verbatim, with `<image>` for each image
      {"input_ids": ...}  the processor's features of one sample, with "labels" if needed; `features(sample)` makes
                          them from the other two formats
    "images" are paths, bytes, PIL images or uint8 arrays. Any sample may have an "id", used in errors. HF Trainer drops
    keys that the model does not accept: TrainingArguments(remove_unused_columns=False) keeps them.

    The batch is a dict: input_ids, attention_mask, labels int64 [B, S]; pixel_values as returned by the processor,
    padded to the largest number of tiles; image_sizes; and the plan. Raises RequestError or ImageError, naming the
    sample, for one that cannot be masked or read.
    """

    def __init__(
        self,
        processor: Any,
        model: Any,
        *,
        labels: bool = True,
        end: str | None = None,
        chat_template: str | None = None,
        padding_side: str | None = None,
        plan: bool = True,
    ) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.config = getattr(model, "config", model)
        self.labels, self.plan = labels, plan
        self.end = (self.tokenizer.eos_token or "") if end is None else end
        self.padding_side = padding_side or (self.tokenizer.padding_side if labels else "left")
        self.template = self._template(chat_template)
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {self.padding_side!r}")
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no padding token: set tokenizer.pad_token, for instance to its unk_token"
            )
        if labels and not self.tokenizer.is_fast:
            raise ValueError("labels need a fast tokenizer, which gives each token's position in the text")

    def __call__(self, samples: Sequence[dict]) -> dict[str, Tensor]:
        if get_worker_info() is not None:  # in a DataLoader worker
            end_with_parent()
        made = [self._named(sample, number) for number, sample in enumerate(samples)]
        batch = self._padded(made)
        if self.plan:
            pixels, frames = (
                next((batch[name] for name in (uint8, stands) if name in batch), None)
                for uint8, stands in uint8_pixels.NAMES.items()
            )
            labels, sizes, counts = (batch.get(name) for name in ("labels", "image_sizes", "batch_num_images"))
            batch |= shipped_plan.make(self.config, batch["input_ids"], labels, pixels, sizes, frames, counts)
        return batch

    def features(self, sample: dict) -> dict[str, Tensor]:
        """One sample's features: input_ids, attention_mask, labels [S], and the processor's pixel_values [images, ...]
        and image_sizes. Raises RequestError or ImageError."""
        segments, sources = self._render(sample)
        token = self.processor.image_token
        text = "".join(segment.text for segment in segments)
        if text.count(IMAGE_PLACEHOLDER) != len(sources):
            raise RequestError(
                f"{text.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} placeholders, but {len(sources)} images"
            )
        segments = [Segment(s.text.replace(IMAGE_PLACEHOLDER, token), s.supervised) for s in segments]
        text = "".join(segment.text for segment in segments)
        bos = self.tokenizer.bos_token
        encoded = self.processor(
            images=[_opened(source) for source in sources] or None,
            text=text,
            add_special_tokens=not ("messages" in sample and bos is not None and text.startswith(bos)),
            return_offsets_mapping=self.labels,
            return_tensors="pt",
        )
        ids = encoded["input_ids"][0]
        out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out |= {name: encoded[name] for name in (*PIXELS, "image_sizes", "batch_num_images") if name in encoded}
        if self.labels:
            is_image = (ids == self.processor.image_token_id).numpy()
            offsets = offsets_before_expansion(encoded["offset_mapping"][0].numpy(), is_image, text, token)
            supervised = torch.from_numpy(supervised_tokens(offsets, segments))
            if not supervised.any():
                raise RequestError("no token of its answer is left to learn from")
            out["labels"] = torch.where(supervised, ids, IGNORE)
        return out

    def _template(self, name: str | None) -> ChatTemplate | None:
        if name is not None:
            return builtin_template(name)
        source = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        return checkpoint_template(source, self.tokenizer.special_tokens_map) if isinstance(source, str) else None

    def _named(self, sample: dict, number: int) -> dict[str, Tensor]:
        """The features of a sample; errors name it by its "id" or its index in the batch."""
        name = sample.get("id", number)
        try:
            made = self._given(sample) if "input_ids" in sample else self.features(sample)
            if self.labels and "labels" not in made:
                raise RequestError("it has no labels: give features with labels, or Collator(..., labels=False)")
            return made
        except LlavaFastError as error:
            raise type(error)(f"sample {name}: {error}") from None

    def _given(self, sample: dict) -> dict[str, Tensor]:
        """Features made by the caller, without the processor's batch dimension of 1."""
        unknown = set(sample) - {*FEATURES, "id"}
        if unknown:
            raise RequestError(f"unknown features {sorted(unknown)}: a batch has {', '.join(FEATURES)}")
        made = {name: torch.as_tensor(value) for name, value in sample.items() if name != "id" and value is not None}
        for name in ("input_ids", "attention_mask", "labels"):
            if name in made:
                made[name] = made[name][0] if made[name].dim() == 2 and len(made[name]) == 1 else made[name]
                if made[name].shape != made["input_ids"].shape or made[name].dim() != 1:
                    raise RequestError(f"{name} has the shape {tuple(made[name].shape)}: give one sample's [S]")
        if not self.labels:
            made.pop("labels", None)
        return {"attention_mask": torch.ones_like(made["input_ids"])} | made

    def _render(self, sample: dict) -> tuple[list[Segment], list]:
        """(segments with `<image>` placeholders, image sources) of a sample."""
        request = {name: value for name, value in sample.items() if name != "answer"}
        if "prompt" not in sample and "messages" not in sample:
            raise RequestError(
                f'it has the keys {sorted(sample)}: give "messages", "prompt" or "input_ids" (HF Trainer drops them '
                "without TrainingArguments(remove_unused_columns=False))"
            )
        if "messages" in sample and self.template is None:
            raise RequestError("its messages need a chat template, and the processor has none: name a chat_template")
        if "messages" in sample and not self.labels:
            messages = list(sample["messages"])
            last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
            request["messages"] = messages[:-1] if last.get("role") == "assistant" else messages
        template = cast(ChatTemplate, self.template)  # not used for a verbatim prompt
        segments, sources, videos = render_request(template, request, self.labels)
        if videos:
            raise RequestError('a "video" is not collated: give the features that the processor makes of it')
        if "prompt" in sample and self.labels:
            answer = sample.get("answer")
            if not isinstance(answer, str) or not answer:
                raise RequestError('labels need a text under "answer": this sample has nothing to learn from')
            if IMAGE_PLACEHOLDER in answer:
                raise RequestError(f"its answer holds {IMAGE_PLACEHOLDER}: images belong to the prompt")
            segments = [*segments, Segment(answer if answer.endswith(self.end) else answer + self.end, True)]
        return segments, sources

    def _padded(self, made: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad the samples' features to one batch."""
        batch = {}
        for name, fill in (("input_ids", self.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", IGNORE)):
            if name in made[0]:
                rows = [each[name].long() for each in made]
                batch[name] = pad_sequence(rows, True, fill, self.padding_side)
        for name in (*PIXELS, "image_sizes", "batch_num_images"):
            parts = [each[name] for each in made if name in each]
            if parts:
                batch[name] = torch.cat(_to_most_tiles(name, parts) if name in PIXELS else parts)
        return batch


def _to_most_tiles(name: str, parts: list[Tensor]) -> list[Tensor]:
    """Pixels [images, tiles, 3, H, W], zero-padded to the largest number of tiles; [images, 3, H, W] unchanged. Raises
    RequestError for videos of different lengths, which cannot be padded."""
    if parts[0].dim() == 4:
        return parts
    most = max(part.shape[1] for part in parts)
    if "videos" in name and any(part.shape[1] != most for part in parts):
        raise RequestError(
            f"the videos of a batch must have equal numbers of frames, got {[part.shape[1] for part in parts]}: sample "
            "the same number from each, or batch videos of one length"
        )
    return [torch.nn.functional.pad(part, (0, 0, 0, 0, 0, 0, 0, most - part.shape[1])) for part in parts]


def _opened(source: Any) -> Any:
    """An image in a form that the processor accepts; files are opened as in transformers."""
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        return open_image(source, exif=True, alpha="drop")
    return source
