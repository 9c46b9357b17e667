"""Tokenizers whose vocabulary is a file of tiktoken's form, which transformers reads only with a checkpoint's own code.

Such a file has a line for each token, its bytes in base64 and its rank, which is its id. Control tokens follow the last
rank in an order that only that code knows, so each form is described here by the name of its file.
Sources: openai/tiktoken; Qwen's tokenization_qwen.py, as in Yuliang-Liu/Monkey 498e1d9.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.storage.files import read_json_if_there, read_text

LONGEST = 2**12
"""Bytes of a token: finding the merges of one takes the square of its length."""


@dataclass(frozen=True)
class Form:
    """pattern: into which pieces a text is split. control: its tokens after the vocabulary, with whether an answer's
    text leaves them out. tags: fields of tokenizer_config.json with names of such tokens, and the supported ones. end:
    the token of the end and of padding."""

    pattern: str
    control: tuple[tuple[str, bool], ...]
    tags: Mapping[str, str]
    end: str


_IN_ANSWERS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
_QWEN_TAGS = {
    f"{what}_{place}_tag": f"<{'/' * (place == 'end')}{token}>"
    for what, token in (("ref", "ref"), ("box", "box"), ("quad", "quad"), ("image", "img"))
    for place in ("start", "end")
}
FORMS = {
    "qwen.tiktoken": Form(
        pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        control=(
            *((token, True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
            *((f"<|extra_{number}|>", True) for number in range(205)),
            *((token, False) for token in _IN_ANSWERS),
            *((token, True) for token in ("<img>", "</img>", "<imgpad>")),
        ),
        tags=_QWEN_TAGS | {"image_pad_tag": "<imgpad>"},
        end="<|endoftext|>",
    )
}
"""Vocabulary file -> its form."""


def find_vocabulary(path: Path) -> str | None:
    """The name of a directory's vocabulary file of tiktoken's form, if that is all it has."""
    if (path / "tokenizer.json").exists():
        return None
    return next((name for name in FORMS if (path / name).exists()), None)


def read_tokenizer(path: Path, name: str) -> Any:
    """The transformers tokenizer of such a directory. Raises CheckpointError for a file that is not of this form."""
    from tokenizers import AddedToken, normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    form = FORMS[name]
    config = read_json_if_there(path / "tokenizer_config.json", fields.TokenizerConfig)
    for field, tag in form.tags.items():
        if config.get(field, tag) != tag:
            raise CheckpointError(f"{path / 'tokenizer_config.json'}: {field} is {config[field]!r}; supported is {tag}")
    ranks = read_ranks(path / name)

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(_: str) -> dict[bytes, int]:  # without the package tiktoken, which may also download
            return ranks

    inner = Converter(name, form.pattern).converted()
    inner.normalizer = normalizers.NFC()
    for special, group in itertools.groupby(form.control, key=lambda token: token[1]):
        tokens = [AddedToken(token, normalized=False, special=special) for token, _ in group]
        (inner.add_special_tokens if special else inner.add_tokens)(tokens)
    options = {field: config[field] for field in ("model_max_length", "padding_side") if config.get(field) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=form.end, pad_token=form.end, **options)


def read_ranks(file: Path) -> dict[bytes, int]:
    """Tokens and their ranks, which are 0 to their number - 1. Raises CheckpointError, naming the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        token, _, rank = line.strip().partition(" ")
        try:
            text, place = base64.b64decode(token, validate=True), int(rank)
        except (binascii.Error, ValueError):
            raise CheckpointError(f"{file}: line {number} is no token in base64 and its rank: {line[:60]!r}") from None
        if len(text) > LONGEST:
            raise CheckpointError(
                f"{file}: line {number} is a token of {len(text)} bytes; supported are up to {LONGEST}"
            )
        ranks[text] = place
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise CheckpointError(f"{file}: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}, each once")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise CheckpointError(f"{file}: it has no token for the byte {missing[0]}")
    return ranks
