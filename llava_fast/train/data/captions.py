"""Images and their captions as a Q-Former reads them: one image and one text a sample, the text by the Q-Former's own
tokenizer, without a prompt or a template.

A sample is one of LLaVA's format whose answer is the caption: {"image": ..., "conversations": [{"from": "human",
"value": "<image>"}, {"from": "gpt", "value": caption}]}. The question's text is not read.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from llava_fast.errors import RequestError
from llava_fast.inputs.chat.messages import content_text, normalise_messages
from llava_fast.inputs.plan.plan import TextPiece
from llava_fast.inputs.prepared import Placeholder
from llava_fast.inputs.processor import Processor
from llava_fast.inputs.requests import Labels


@dataclass(frozen=True)
class CaptionProcessor(Processor):
    """`most_tokens` of a caption are read, [CLS] and [SEP] included."""

    most_tokens: int = 32

    @classmethod
    def of(cls, processor: Processor, most_tokens: int) -> CaptionProcessor:
        return cls(**{each.name: getattr(processor, each.name) for each in fields(Processor)}, most_tokens=most_tokens)

    def outline(self, request: dict, labels: Labels = False) -> list[TextPiece | Placeholder]:
        """The image, which carries the caption's ids as its instruction, and the ids as a text. Raises RequestError
        for a sample without one image and one caption."""
        messages, sources = normalise_messages(request["messages"])
        given = iter(request.get("images") or ())
        images = [next(given, None) if source is None else source for source in sources]
        captions = [content_text(each["content"]) for each in messages if each["role"] == "assistant"]
        if len(images) != 1 or request.get("video") is not None:
            raise RequestError(f"stage 1 compares one image with one caption, and this sample has {len(images)} images")
        if len(captions) != 1 or not captions[0].strip():
            raise RequestError("stage 1 compares one image with one caption: the sample's one answer is the caption")
        encoded = self.tokenizer(captions[0].strip(), truncation=True, max_length=self.most_tokens)
        ids = np.asarray(encoded["input_ids"], np.int32)
        return [Placeholder("<image>", images[0], True, ids), TextPiece(ids, np.ones(len(ids), bool))]
