"""Tokenizers of the shapes that checkpoints have, small: Llama's two, Qwen's and Llama 3's."""

import functools

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.support import tiny


@functools.lru_cache
def llama_tokenizer(every_piece: bool) -> PreTrainedTokenizerFast:
    """SentencePiece-like: "▁" for spaces, bytes for the rest. `every_piece`: as Llama's legacy form, "▁" is put
    before every piece between special tokens; else, as its newer form, before the first alone."""
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    tokens = [*tiny.SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁the", "▁N", "th", "he", "No"]
    merges = [("▁t", "he"), ("t", "h"), ("▁", "t"), ("h", "e"), ("th", "e"), ("▁", "N"), ("N", "o")]
    tokens += [token for pair in merges if (token := "".join(pair)) not in tokens]
    inner = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if every_piece:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"],
    )


# How Qwen 2 splits a text: newlines with the white space before them are one piece, so "\n\n" may be one token.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3_SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]


def byte_level(special: list[str], bos: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's pieces; "\n\n" and " the" are tokens, "\n" is one."""
    merges = [("Ċ", "Ċ"), ("Ċ", "ĊĊ"), ("Ġ", "t"), ("Ġt", "he"), ("h", "e"), ("a", "s"), ("!", "Ċ")]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [token for pair in merges if (token := "".join(pair)) not in tokens]
    inner = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    pieces = pre_tokenizers.Split(Regex(QWEN_PIECES), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, additional_special_tokens=special)


@functools.lru_cache
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(QWEN_SPECIAL, None)


@functools.lru_cache
def llama_3_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(LLAMA_3_SPECIAL, LLAMA_3_SPECIAL[0])


TOKENIZERS = {
    "bytes": tiny.tokenizer,
    "bytes without bos": lambda: tiny.tokenizer(bos=False),
    "llama": lambda: llama_tokenizer(False),
    "llama legacy": lambda: llama_tokenizer(True),
}
