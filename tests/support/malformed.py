"""Checkpoints with one thing wrong each, for test_checkpoint_malformed: what is changed, and which file is to blame."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_checkpoints import save_hf, tokenizer, write_original

NAN, INFINITY = float("nan"), float("inf")
HUGE = 10**9
PROCESSOR = {
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_center_crop": True,
}


def save_kinds(root: Path) -> None:
    """Whole checkpoints to be damaged: llava, llava_next, and an original one."""
    for kind in ("llava", "llava_next"):
        save_hf(kind, root / kind)
        tokenizer("<image>").save_pretrained(root / kind)
        write(root / kind / "preprocessor_config.json", PROCESSOR)
        write(root / kind / "processor_config.json", {"patch_size": 14})
        write(root / kind / "generation_config.json", {"eos_token_id": 2})
        write(root / kind / "chat_template.json", {"chat_template": "{{ messages[0].content }}"})
        write(root / kind / "special_tokens_map.json", {"eos_token": "</s>"})
        write(root / kind / "added_tokens.json", {"<image>": 94})
    write_original(root / "original")
    tokenizer().save_pretrained(root / "original")


def write(file: Path, content: object) -> None:
    """JSON, or bytes as they are; in place of a link, not through it."""
    file.unlink(missing_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def fields(file: str, section: tuple[str, ...], values: dict[str, list]) -> list[tuple]:
    """Cases that give a field of a JSON file each of some values."""

    def change(field, value):
        def apply(path: Path) -> None:
            content = json.loads((path / file).read_text())
            inside = content
            for name in section:
                inside = inside[name]
            inside[field] = value
            write(path / file, content)

        return apply

    return [
        (f"{'.'.join((*section, field))}={str(value)[:40]}", file, change(field, value))
        for field, each in values.items()
        for value in each
    ]


def damaged(file: str) -> list[tuple]:
    """Cases in which a JSON file is none, or no file."""
    contents = {
        "empty": b"",
        "cut short": b'{"a": [1, 2',
        "a list": b"[]",
        "a number": b"7",
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "Latin-1": '{"a": "é"}'.encode("latin-1"),
        "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "nested": b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
        "half a pair": b'{"a": "\\ud800"}',
        "digits": b'{"a": ' + b"9" * 10_000 + b"}",
    }

    def fill(content: bytes) -> Callable[[Path], None]:
        return lambda path: write(path / file, content)

    def large(path: Path) -> None:
        write(path / file, b"{}")
        os.truncate(path / file, 2**26 + 1)

    return [
        *((f"{file} is {what}", file, fill(content)) for what, content in contents.items()),
        (f"{file} is too large", file, large),
        (f"{file} is a FIFO", file, replaced(file, os.mkfifo)),
        (f"{file} is a directory", file, replaced(file, os.mkdir)),
    ]


def replaced(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        (path / file).unlink(missing_ok=True)
        make(path / file)

    return apply


def together(more: dict, change: Callable[[Path], None]) -> Callable[[Path], None]:
    """A change of config.json on top of other fields."""

    def apply(path: Path) -> None:
        write(path / "config.json", json.loads((path / "config.json").read_text()) | more)
        change(path)

    return apply


def without(change: Callable[[Path], None], file: str = "chat_template.json") -> Callable[[Path], None]:
    """A change, and one file less."""
    return lambda path: ((path / file).unlink(), change(path))[1]


NUMBERS = ["x", NAN, INFINITY, -1.0, 0, None]
TEXT = {
    "model_type": [7, "gpt2", []],
    "vocab_size": ["x", 1.5, 0, -1, HUGE, [], None, True],
    "hidden_size": [0, HUGE, {}],
    "num_hidden_layers": ["2", -1, HUGE, False],
    "num_attention_heads": [0, 7, HUGE],
    "num_key_value_heads": [0, 3, HUGE],
    "head_dim": [0, 3, HUGE],
    "max_position_embeddings": [-1, 10**12, "x"],
    "rms_norm_eps": NUMBERS,
    "hidden_act": [7, "odd"],
    "attention_bias": ["x"],
    "rope_parameters": [
        7,
        {"rope_type": "odd", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": NAN},
        {"rope_type": "default", "rope_theta": 0},
        {"rope_type": "default", "rope_theta": "x"},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0},
    ],
}
TOWER = {
    "model_type": [7, "vit"],
    "hidden_size": [0, HUGE, None],
    "num_hidden_layers": [0, 2.0, HUGE],
    "num_attention_heads": [-1, 5],
    "image_size": ["x", HUGE, [28, 28], None],
    "patch_size": [0, 29, None],
    "num_channels": [1, 4],
    "layer_norm_eps": [NAN, -1.0],
    "hidden_act": [7, "odd"],
}
TOP = {
    "model_type": [7, None, "gpt2", [], {}],
    "text_config": [7, [], "x"],
    "vision_config": [7, [], "x"],
    "image_token_index": ["x", HUGE, -HUGE, 1.5, None, True],
    "vision_feature_layer": ["x", 99, -99, [], [99], 1.5, {}, None],
    "vision_feature_select_strategy": [7, "odd", None],
    "projector_hidden_act": [7, "odd", None],
    "multimodal_projector_bias": ["x"],
    "tie_word_embeddings": ["x"],
    "eos_token_id": ["x", HUGE, [HUGE], {}],
    "pad_token_id": ["x", HUGE, [3]],
    "quantization_config": [7, [], {"quant_method": "awq"}],
}
IMAGES = {
    "image_mean": ["x", [0.5], [NAN] * 3, ["x"] * 3, [INFINITY] * 3, {"r": 0.5}, INFINITY],
    "image_std": [[0, 0, 0], [-1, 1, 1], [NAN] * 3, {}],
    "size": ["x", [28], [28, 28, 28], [28, "x"], -1, {"height": "x"}, {"height": 1.5}, HUGE],
    "crop_size": ["x", {"height": 27, "width": 28}],
    "do_center_crop": [7],
    "do_pad": ["x"],
}
ORIGINAL = {
    "mm_vision_tower": [7, [], {}, "", "x" * 5000, "a\0b", "~no-such-user/tower"],
    "mm_projector_type": [7, None, "odd", "mlp999999999x_gelu"],
    "mm_vision_select_layer": ["x", 99, None],
    "mm_vision_select_feature": [7, None, "odd"],
    "mm_patch_merge_type": [7, None, "odd"],
    "mm_spatial_pool_stride": ["x", -1, HUGE],
    "mm_resampler_type": [7, "odd", "spatial_pool"],
    "mm_newline_position": [7, None],
    "image_aspect_ratio": [7, "odd", "anyres", "anyres_max_" + "9" * 5000],
    "num_hidden_layers": [HUGE],
    "rope_scaling": [7, {"type": "odd", "factor": 2.0}, {"type": "linear"}],
}
PINPOINTS = [7, "x", "(1x1),...,(99999x99999)", [[1]], [["a", "b"]], [[0, 0]], [[HUGE, HUGE]], [[30, 30]], []]
TILED = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[28, 56]]}
TEMPLATES = [7, {}, [], [7], {"default": 7}, "", "{% for", "{{ 'a' * 10 ** 10 }}", "{{ 1 | nonsense }}"]


def tensors(file: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = load_file(path / file)
        change(content)
        (path / file).unlink()
        save_file(content, path / file)

    return apply


def header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A safetensors file whose header is changed and whose data stay."""

    def apply(path: Path) -> None:
        raw = (path / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        content = json.loads(raw[8 : 8 + length])
        changed = json.dumps(change(content) or content).encode()
        write(path / "model.safetensors", struct.pack("<Q", len(changed)) + changed + raw[8 + length :])

    return apply


def first(content: dict) -> dict:
    return next(value for key, value in content.items() if key != "__metadata__")


def raw_weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: write(path / "model.safetensors", change((path / "model.safetensors").read_bytes()))


def as_bin(change: Callable[[dict], object], **options) -> Callable[[Path], None]:
    """The weights as a pickle, changed."""

    def apply(path: Path) -> None:
        content = load_file(path / "model.safetensors")
        (path / "model.safetensors").unlink()
        torch.save(change(content) or content, path / "pytorch_model.bin", **options)

    return apply


class Code:
    """Unpickling one leaves a file behind: proof that code ran."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __reduce__(self):
        return os.mkdir, (self.where,)


def pickled_code(path: Path) -> None:
    (path / "model.safetensors").unlink()
    with open(path / "pytorch_model.bin", "wb") as file:
        pickle.dump({"a": Code(str(path / "ran"))}, file)


def index(weight_map: object, make: Callable[[Path], object] | None = None) -> Callable[[Path], None]:
    """An index in place of the single file, which becomes shard.safetensors."""

    def apply(path: Path) -> None:
        (path / "model.safetensors").rename(path / "shard.safetensors")
        if make is not None:
            make(path)
        write(path / "model.safetensors.index.json", {"weight_map": weight_map})

    return apply


WEIGHTS = [
    ("empty", raw_weights(lambda raw: b"")),
    ("cut short", raw_weights(lambda raw: raw[:-100])),
    ("cut in its header", raw_weights(lambda raw: raw[:100])),
    ("a header of 2^63 bytes", raw_weights(lambda raw: struct.pack("<Q", 2**63) + raw[8:])),
    ("a header as long as the file", raw_weights(lambda raw: struct.pack("<Q", len(raw)) + raw[8:])),
    ("a header that is no JSON", raw_weights(lambda raw: raw[:8] + b"x" * 1000 + raw[1008:])),
    ("a header that is a list", header(lambda content: [1])),
    ("a nested header", header(lambda content: {"a": json.loads("[" * 500 + "]" * 500)})),
    ("an entry that is none", header(lambda content: {**content, "x": 7})),
    ("an unknown dtype", header(lambda content: first(content).update(dtype="F4096"))),
    ("a negative shape", header(lambda content: first(content).update(shape=[-1]))),
    ("a shape beyond its data", header(lambda content: first(content).update(shape=[HUGE, HUGE]))),
    ("offsets beyond the file", header(lambda content: first(content).update(data_offsets=[0, 2**60]))),
    ("offsets backwards", header(lambda content: first(content).update(data_offsets=[64, 0]))),
    ("overlapping offsets", header(lambda content: {**content, "x": first(content)})),
    ("a tensor too many", tensors("model.safetensors", lambda content: content.update(x=torch.ones(1)))),
    (
        "another shape",
        tensors("model.safetensors", lambda content: content.update({min(content): torch.ones(1, 2, 3)})),
    ),
    (
        "whole numbers",
        tensors("model.safetensors", lambda content: content.update({k: v.int() for k, v in content.items()})),
    ),
]
BIN = [
    ("text", lambda path: ((path / "model.safetensors").unlink(), write(path / "pytorch_model.bin", b"text"))),
    ("code", pickled_code),
    ("a list", as_bin(lambda content: [torch.ones(1)])),
    ("numbers", as_bin(lambda content: {"a": 1})),
    ("numbered tensors", as_bin(lambda content: dict(enumerate(content.values())))),
    ("a sparse tensor", as_bin(lambda content: content.update({min(content): torch.eye(3).to_sparse()}))),
    ("a tensor without values", as_bin(lambda content: content.update({min(content): torch.empty(3, device="meta")}))),
    ("an old file with a list", as_bin(lambda content: [1], _use_new_zipfile_serialization=False)),
]
MISSING = [
    ("a tensor", tensors("model.safetensors", lambda content: content.popitem() and None)),
    ("a pickled tensor", as_bin(lambda content: content.popitem() and None)),
    ("all tensors", tensors("model.safetensors", lambda content: content.clear())),
]
INDEX = [
    ("no mapping", index(7)),
    ("a list", index(["shard.safetensors"])),
    ("empty", index({})),
    ("numbers", index({"a": 7})),
    ("a shard that is missing", index({"a": "missing.safetensors"})),
    ("a tensor that is missing", index({"a": "shard.safetensors"})),
    ("above", index({"a": "../llava/model.safetensors"})),
    ("elsewhere", index({"a": "/etc/passwd"})),
    ("above, as Windows writes it", index({"a": "..\\shard.safetensors"})),
    ("a drive", index({"a": "C:\\shard.safetensors"})),
    ("the directory", index({"a": "."})),
    ("nothing", index({"a": ""})),
    ("a directory", index({"a": "inner"}, lambda path: (path / "inner").mkdir())),
    ("a FIFO", index({"a": "fifo.safetensors"}, lambda path: os.mkfifo(path / "fifo.safetensors"))),
    ("no name", index({"a": "a\0b"})),
    ("a long name", index({"a": "x" * 5000})),
]
TOKENIZER = {
    "tokenizer_config.json": {
        "tokenizer_class": [7],
        "added_tokens_decoder": [7, [], {"0": 7}, {"x": {"content": "y"}}],
        "model_max_length": ["x", NAN, -1],
        "eos_token": [7, [], {"odd": 1}],
    },
    "special_tokens_map.json": {"eos_token": [7, [7]], "odd": [7]},
    "added_tokens.json": {"odd": ["x", -1, HUGE, 1.5]},
    "tokenizer.json": {"model": [7, {}, {"type": "odd"}, {"type": "BPE"}], "version": [7], "added_tokens": [7, [7]]},
}


def cases() -> list[tuple[str, str, str, Callable[[Path], None]]]:
    """(kind of checkpoint, what is wrong, the file to blame, the change)."""
    config = "config.json"
    templates = fields("tokenizer_config.json", (), {"chat_template": TEMPLATES})
    llava = [
        *fields(config, (), TOP),
        *fields(config, ("text_config",), TEXT),
        *fields(config, ("vision_config",), TOWER),
        *fields("preprocessor_config.json", (), IMAGES),
        *fields("generation_config.json", (), {"eos_token_id": ["x", HUGE, {}, [None]], "pad_token_id": [1.5]}),
        *fields("chat_template.json", (), {"chat_template": TEMPLATES}),
        *((what, file, without(change)) for what, file, change in templates),
        *fields("processor_config.json", (), {"image_processor": [7, []], "chat_template": [7]}),
        *(case for file, each in TOKENIZER.items() for case in fields(file, (), each)),
        *damaged(config),
        *(case for file in ("preprocessor_config.json", "tokenizer_config.json") for case in damaged(file)[::2]),
        *(case for file in ("generation_config.json", "tokenizer.json") for case in damaged(file)[2::3]),
        *((f"weights: {what}", "model.safetensors", change) for what, change in WEIGHTS),
        *((f"missing: {what}", "config.json", change) for what, change in MISSING),
        *((f"pickle: {what}", "pytorch_model.bin", change) for what, change in BIN),
        *((f"index: {what}", "model.safetensors.index.json", change) for what, change in INDEX),
    ]
    original = fields(config, (), ORIGINAL)
    endless = ["9" * 5000, "(1x1)," * 9000, "(0x0),...,(0x0)"]
    pinpoints = fields(config, (), {"image_grid_pinpoints": [*PINPOINTS, *endless]})
    return [
        *(("llava", *case) for case in llava),
        *(("llava_next", *case) for case in fields(config, (), {"image_grid_pinpoints": PINPOINTS})),
        *(("original", *case) for case in original),
        *(("original", what, file, together(TILED, change)) for what, file, change in pinpoints),
    ]
