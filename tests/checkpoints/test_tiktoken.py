"""Vocabulary files of tiktoken's form: what a tokenizer made from one does, beside tiktoken's rule of merging."""

import base64
import itertools
import unicodedata

import pytest
import regex

from llava_fast.checkpoints.tiktoken import FORMS, read_ranks
from llava_fast.checkpoints.tokenizer import load_tokenizer
from llava_fast.errors import CheckpointError
from tests.support import qwen_vl

FORM = FORMS["qwen.tiktoken"]
TEXTS = [
    "hello the other user\n\n\nfoo  foo a",
    "Cafe\u0301 \u4f60\u597d \U0001f600 it's 2025",
    "<|im_start|>user\nPicture 1: <img>x</img>\n<ref>a foo</ref><box>(1,2),(30,4)</box><|im_end|>",
    " hell hellohell",
]


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's merges: the pair of neighbours with the lowest rank first, the first of several."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def encoded(text: str, ranks: dict[bytes, int]) -> list[int]:
    ids, control = [], [token for token, _ in FORM.control]
    for part in regex.split("(" + "|".join(map(regex.escape, control)) + ")", text):
        if part in control:
            ids.append(len(ranks) + control.index(part))
        else:
            for piece in regex.findall(FORM.pattern, part):
                ids += [ranks[piece.encode()]] if piece.encode() in ranks else merged(piece.encode(), ranks)
    return ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    qwen_vl.write(folder)
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_its_ids_are_tiktokens(folder, text):
    words, ranks = load_tokenizer(folder), read_ranks(folder / "qwen.tiktoken")
    assert words(text)["input_ids"] == encoded(unicodedata.normalize("NFC", text), ranks)
    assert words.decode(words(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_control_tokens_have_the_published_ids(folder):
    words = load_tokenizer(folder)
    first = len(qwen_vl.RANKS)
    published = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|extra_204|>": 151850, "<img>": 151857}
    published |= {"<ref>": 151851, "</quad>": 151856, "</img>": 151858, "<imgpad>": 151859}
    for token, number in published.items():
        assert words.convert_tokens_to_ids(token) == number - 151643 + first
    assert (words.eos_token, words.pad_token, words.bos_token) == ("<|endoftext|>", "<|endoftext|>", None)
    assert words.model_max_length == 8192
    answer = words("<ref>foo</ref><box>(1,2),(3,4)</box><|im_end|>")["input_ids"]
    assert words.decode(answer, skip_special_tokens=True) == "<ref>foo</ref><box>(1,2),(3,4)</box>"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["IQ== 0", "??"], "line 2 is no token in base64 and its rank"),
        (["IQ== 0", "Ig== two"], "line 2 is no token in base64 and its rank"),
        (["IQ== 0", "Ig== 2"], "the ranks of its 2 tokens are not 0 to 1, each once"),
        (["IQ== 0", base64.b64encode(bytes(4097)).decode() + " 1"], "line 2 is a token of 4097 bytes"),
        (["IQ== 0"], "it has no token for the byte 0"),
        ([], "the ranks of its 0 tokens"),
    ],
)
def test_other_files_are_refused(tmp_path, lines, said):
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match=said):
        load_tokenizer(tmp_path)


def test_other_tags_are_refused(tmp_path):
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(qwen_vl.RANKS))
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines))
    (tmp_path / "tokenizer_config.json").write_text('{"box_start_tag": "<where>"}')
    with pytest.raises(CheckpointError, match="box_start_tag is '<where>'; supported is <box>"):
        load_tokenizer(tmp_path)
