"""The text of a request that a connector reads with its images (InstructBLIP, LLaMA-VID): the question, without a
template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_fast.errors import RequestError
from llava_fast.inputs.chat.messages import content_text, normalise_messages


@dataclass(frozen=True)
class Instructions:
    """The connector's own tokenizer, the most tokens that it reads, and its vocabulary's size. `cuts`: of a longer text
    it reads the last tokens; False: such a text is refused."""

    tokenizer: Any
    most: int
    vocabulary: int
    cuts: bool = False

    def of(self, request: dict, placeholders: re.Pattern, literal: bool = False) -> list[np.ndarray]:
        """int32 ids for each of the request's placeholders, in order: of the user message that contains it, or of the
        whole "prompt", without placeholders. So an image's instruction stays the same when a conversation goes on.
        literal: a placeholder in a message's text is text. Raises RequestError for a text that is too long, or that has
        a token without an embedding.
        """
        if "prompt" in request:
            text, count = placeholders.subn("", request["prompt"])
            return [self._ids(text)] * count
        found: list[np.ndarray] = []
        for message in normalise_messages(request["messages"])[0]:
            items = message["content"]
            texts = [item for item in items if item["type"] == "text"]
            text, count = content_text(texts), len(items) - len(texts)
            if not literal:
                text, count = placeholders.subn("", content_text(items))
            if count and message["role"] == "user":
                found += [self._ids(text.strip())] * count
        return found

    def _ids(self, text: str) -> np.ndarray:
        if self.cuts:
            self.tokenizer.truncation_side = "left"
            ids = self.tokenizer(text, truncation=True, max_length=self.most)["input_ids"]
        else:
            ids = self.tokenizer(text)["input_ids"]
        if len(ids) > self.most:
            raise RequestError(
                f"the text beside an image has {len(ids)} tokens for the connector, which reads at most {self.most}: "
                "shorten it"
            )
        if (largest := max(ids, default=0)) >= self.vocabulary:
            raise RequestError(
                f"the connector's tokenizer gives {self.tokenizer.convert_ids_to_tokens(largest)!r} the id {largest}, "
                f"and the connector has embeddings for {self.vocabulary} tokens: use the tokenizer of its checkpoint"
            )
        return np.asarray(ids, np.int32)
