"""llama.cpp as an optional peer: the subject's decoder as a GGUF file, timed by a `llama-bench` that the user names.

The f16 file has the subject's weights. `llama-quantize`, from the same folder as llama-bench, quantises it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import LLAMA_CPP, Peer, PeerTimes, Settings
from benchmarks.subject import Subject
from llava_fast.families.llava_names import from_stored, is_skipped
from llava_fast.models.decoders.llama import LlamaConfig

FORMATS = {None: ("f16",), "int8": ("q8_0",), "int4": ("q4_K_M", "q4_0")}
"""The formats of llama.cpp with which a quantisation scheme is compared."""


def peers(subject: Subject, settings: Settings, prompt: int = 0, new_tokens: int = 0, context: int = 0) -> list[Peer]:
    """Return a peer for each format if llama.cpp was selected. A call processes `prompt` rows, or decodes `new_tokens`
    after `context` rows, or both in sequence if `prompt` and `new_tokens` are given."""
    if LLAMA_CPP not in settings.backends:
        return []

    def run(form: str) -> PeerTimes:
        path = _file(subject, settings, form)
        command = [str(settings.llama_bench), "--model", str(path), "--threads", str(settings.threads)]
        command += ["--n-gpu-layers", "0", "--output", "json", "--repetitions", str(settings.iters)]
        if prompt and new_tokens:
            command += ["--n-prompt", "0", "--n-gen", "0", "-pg", f"{prompt},{new_tokens}"]
        else:
            command += ["--n-prompt", str(prompt), "--n-gen", str(new_tokens), "--n-depth", str(context)]
        return parse(_output_of(command))

    return [Peer(f"{LLAMA_CPP} {form}", partial(run, form)) for form in FORMATS[settings.quantize]]


def parse(text: str) -> PeerTimes:
    """Parse the output of `llama-bench --output json` for one test. Raises ValueError for anything else."""
    try:
        (test,) = json.loads(text)
        seconds = [nanoseconds / 1e9 for nanoseconds in test["samples_ns"]]
        version = f"{test['build_commit']} ({test['build_number']})"
        size = int(test["model_size"])
    except (ValueError, TypeError, KeyError) as problem:
        raise ValueError(f"llama-bench printed no result of one test as JSON ({problem!r}): {text[:200]!r}") from None
    if not seconds:
        raise ValueError("llama-bench printed no samples: it ran no repetition")
    return PeerTimes(seconds, size, {LLAMA_CPP: version})


def _file(subject: Subject, settings: Settings, form: str) -> Path:
    """Return the GGUF file of the subject's decoder in a format. It is created if it does not exist."""
    folder = settings.gguf_dir or subject.directory
    folder.mkdir(parents=True, exist_ok=True)
    stem = subject.label.replace(", ", "-").replace(" ", "-")
    path = folder / f"{stem}-{form}.gguf"
    if path.is_file():
        return path
    part = path.with_suffix(".part")  # renamed when complete
    if form == "f16":
        write_gguf(subject, part)
    else:
        quantizer = settings.llama_bench.with_name("llama-quantize")
        source = _file(subject, settings, "f16")
        _output_of([str(quantizer), str(source), str(part), form.upper(), str(settings.threads)])
    part.rename(path)
    return path


def write_gguf(subject: Subject, path: Path) -> None:
    """Write the subject's decoder in float16, with norms in float32. Raises ValueError for a decoder other than Llama,
    and if the package gguf is not installed."""
    check_package()
    import gguf

    decoder = subject.config.decoder
    if type(decoder) is not LlamaConfig or decoder.qkv_bias or decoder.tie_embeddings:
        raise ValueError(f"{LLAMA_CPP}: only a Llama decoder without biases is written, with an output head of its own")
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_context_length(decoder.context_length)
    writer.add_embedding_length(decoder.hidden_size)
    writer.add_block_count(decoder.num_layers)
    writer.add_feed_forward_length(decoder.intermediate_size)
    writer.add_head_count(decoder.num_heads)
    writer.add_head_count_kv(decoder.num_kv_heads)
    writer.add_rope_dimension_count(decoder.head_dim)
    writer.add_layer_norm_rms_eps(decoder.rms_norm_eps)
    writer.add_vocab_size(decoder.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(writer, gguf, decoder.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, decoder.num_layers)
    for name, value in _decoder_weights(subject):  # two passes: only one weight at a time is in memory
        dtype = np.dtype(np.float16 if value.dim() > 1 else np.float32)
        size = value.numel() * dtype.itemsize
        writer.add_tensor_info(names.get_name(name, try_suffixes=(".weight",)), tuple(value.shape), dtype, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, value in _decoder_weights(subject):
        turned = {"q_proj": decoder.num_heads, "k_proj": decoder.num_kv_heads}.get(name.split(".")[-2])
        rows = value if turned is None else _interleaved(value, turned)
        writer.write_tensor_data(rows.to("cpu", torch.float16 if value.dim() > 1 else torch.float32).numpy())
    writer.close()


def _decoder_weights(subject: Subject) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in a Llama checkpoint, weight)."""
    for stored, value in subject.weights():
        name = "" if is_skipped(stored) else from_stored(stored) or ""
        if name.startswith("decoder."):
            leaf = name.removeprefix("decoder.")
            yield (leaf if leaf.startswith("lm_head.") else f"model.{leaf}"), value.detach()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorder query or key rows for llama.cpp, which rotates adjacent pairs. transformers rotates halves of a head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _add_tokenizer(writer, gguf, vocabulary: int) -> None:
    """Add a placeholder tokenizer, which llama.cpp requires. llama-bench uses random token ids."""
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"word{number}".encode() for number in range(3, vocabulary))])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.NORMAL] * (vocabulary - 3)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def check_package() -> None:
    """Raise ValueError if gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{LLAMA_CPP} needs gguf: pip install 'llava_fast[llama-cpp]'")


def _output_of(command: list[str]) -> str:
    """Run a program and return its output. Raises ValueError with the last line of stderr if it fails or is missing."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as problem:
        raise ValueError(f"{command[0]} does not start: {problem.strerror}") from None
    except subprocess.CalledProcessError as problem:
        last = (problem.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{command[0]} failed with exit code {problem.returncode}: {last}") from None
