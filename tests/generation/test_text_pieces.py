"""Text from tokens: streamed pieces join to the tokenizer's own text, up to the stop string and no half characters."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from llava_fast.generation.text import MOST_PENDING, TextDecoder, _Begun
from tests.support import tiny


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with "▁" for their space, bytes for the rest, and the space before the first word taken off again."""
    words = ["▁", "▁▁", "a", "b", "▁a", "▁the", "the", "ab", "\n", "▁日", "é"]
    tokens = [*tiny.SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<|im_end|>"],
    )


TOKENIZERS = {"bytes": tiny.tokenizer(), "sentencepiece": sentencepiece_like()}


def token_of_byte(name: str, byte: int) -> int:
    """The token of one byte. GPT-2's table writes printable bytes as themselves and moves the rest up from 256."""
    if name == "sentencepiece":
        return TOKENIZERS[name].convert_tokens_to_ids(f"<0x{byte:02X}>")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = chr(byte) if byte in printable else chr(256 + others.index(byte))
    return TOKENIZERS[name].convert_tokens_to_ids(letter)


def tokens_of(name: str, text: str) -> list[int]:
    """Text byte by byte."""
    return [token_of_byte(name, byte) for byte in text.encode()]


def answers(name: str):
    """Token ids of well-formed text: words, special tokens, and characters spelt byte by byte."""
    words = [t for t in range(len(TOKENIZERS[name])) if t < len(tiny.SPECIAL) or t >= len(tiny.SPECIAL) + 256]
    units = st.one_of(
        st.sampled_from(words).map(lambda t: [t]), st.characters(codec="utf-8").map(lambda c: tokens_of(name, c))
    )
    return st.lists(units, max_size=8).map(lambda parts: list(chain(*parts)))


def whole(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def run(tokenizer, ids, stop=()) -> tuple[TextDecoder, list[str]]:
    text, pieces = TextDecoder(tokenizer, stop), []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    assert text.text == "".join(pieces)
    return text, pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=150)
def test_pieces_join_to_the_tokenizers_own_text(name, data):
    ids = data.draw(answers(name))
    text, _ = run(TOKENIZERS[name], ids)
    assert text.text == whole(TOKENIZERS[name], ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=150)
def test_nothing_of_a_stop_string_comes_out(name, data):
    ids = data.draw(answers(name))
    full = whole(TOKENIZERS[name], ids)
    begin = data.draw(st.integers(0, max(0, len(full) - 1)))
    stop = full[begin : begin + data.draw(st.integers(1, 4))] or "he"
    text, _ = run(TOKENIZERS[name], ids, (stop,))
    assert text.text == full.split(stop)[0]
    assert text.stopped == (stop in full)


@given(st.text(max_size=12), st.text(min_size=1, max_size=3))
@settings(max_examples=150)
def test_characters_are_never_split(text, stop):
    """Real text, byte by byte: no piece holds a replacement character, and each appears as soon as it is certain."""
    tokenizer, ids = TOKENIZERS["bytes"], tokens_of("bytes", text)
    decoder, pieces = run(tokenizer, ids)
    assert decoder.text == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert sum(piece != "" for piece in pieces) == len(text)
    stopped, _ = run(tokenizer, ids, (stop,))
    assert stopped.text == text.split(stop)[0]


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_cannot():
    tokenizer = TOKENIZERS["bytes"]
    decoder = TextDecoder(tokenizer, ("###", "# end"))
    assert [decoder.push(token) for token in tokens_of("bytes", "a##b# e")] == ["a", "", "", "##b", "", "", ""]
    assert decoder.finish() == "# e"
    assert not decoder.stopped


def test_the_first_of_several_stop_strings_counts_and_empty_ones_do_not():
    tokenizer = TOKENIZERS["bytes"]
    ids = tokens_of("bytes", "abcdef")
    assert run(tokenizer, ids, ("e", "cd", ""))[0].text == "ab"
    assert run(tokenizer, ids, ("",))[0].text == "abcdef"


def test_a_stop_string_inside_one_token_keeps_what_comes_before():
    tokenizer = TOKENIZERS["bytes"]
    decoder, _ = run(tokenizer, [tokenizer.convert_tokens_to_ids("hello")], ("l",))
    assert decoder.text == "he"
    assert decoder.stopped


@given(st.lists(st.integers(0, 255), max_size=12), st.integers(0, 255))
@settings(max_examples=100)
def test_bytes_that_are_no_text_become_replacement_characters(noise, last):
    """Random bytes decode as the tokenizer decodes them, and what is incomplete comes out at the end."""
    ids = [token_of_byte("bytes", byte) for byte in [*noise, last]]
    assert run(TOKENIZERS["bytes"], ids)[0].text == whole(TOKENIZERS["bytes"], ids)


def test_tokens_that_are_no_text_do_not_pile_up():
    decoded = []

    class Tokenizer:
        def decode(self, ids, **_):
            decoded.append(len(ids))
            return "\ufffd" * len(ids)

    text = TextDecoder(Tokenizer())
    pieces = [text.push(1) for _ in range(500)]
    assert "".join(pieces) + text.finish() == "\ufffd" * 500
    assert max(decoded) <= 2 * MOST_PENDING


@given(st.text("ab", min_size=1, max_size=6), st.lists(st.text("ab", max_size=4), max_size=6))
def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string(stop, texts):
    begun, whole = _Begun(stop), ""
    for text in texts:
        whole += text
        if stop in whole:
            return
        longest = max(size for size in range(len(stop)) if whole.endswith(stop[:size]))
        assert begun.add(text) == longest
