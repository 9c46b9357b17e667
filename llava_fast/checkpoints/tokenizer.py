"""Loads a checkpoint's tokenizer with transformers, after validating its side files."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_fast.checkpoints.tiktoken import find_vocabulary, read_tokenizer
from llava_fast.errors import CheckpointError
from llava_fast.families import fields
from llava_fast.storage.files import Fields, check_regular, one_line, read_json, read_json_if_there

_SIDE_FILES: dict[str, type[Fields]] = {
    "tokenizer_config.json": fields.TokenizerConfig,
    "special_tokens_map.json": fields.SpecialTokens,
    "added_tokens.json": fields.AddedTokens,
}
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")
_READ = (*_SIDE_FILES, *_VOCABULARIES, "config.json", "chat_template.jinja")  # the files that transformers reads
_MARK = b"\xef\xbb\xbf"


def load_tokenizer(path: Path, stands_in: str | None = None) -> Any:
    """The transformers tokenizer of a directory. Code in the checkpoint is never run.

    stands_in  transformers' class for a tokenizer whose own is such code. It puts a BOS token before a text unless
               tokenizer_config.json or a tokenizer.json says otherwise.

    Raises CheckpointError for a missing or invalid tokenizer, naming the faulty file if known.
    """
    import transformers  # imported late, because importing it takes a second

    for name, kind in _SIDE_FILES.items():
        settings = read_json_if_there(path / name, kind)
        for field, value in settings.items():
            if field.endswith("_file") and isinstance(value, str) and Path(value).exists():
                check_regular(Path(value))
    for name in _READ:
        if (path / name).exists():
            check_regular(path / name)
    settings = read_json_if_there(path / "tokenizer_config.json")
    ranks = find_vocabulary(path)
    try:
        if ranks is not None:
            return read_tokenizer(path, ranks)
        with _without_marks(path) as clean:
            if stands_in is not None and "AutoTokenizer" in (settings.get("auto_map") or {}):
                saved = (clean / "tokenizer.json").is_file()  # which says itself what precedes a text
                bos = {} if saved else {"add_bos_token": settings.get("add_bos_token", True)}
                tokenizer = getattr(transformers, stands_in).from_pretrained(clean, **bos)
            else:
                config = _stand_in_config(path)
                tokenizer = transformers.AutoTokenizer.from_pretrained(clean, trust_remote_code=False, **config)
    except CheckpointError:
        raise
    except BaseException as error:  # a panic in the Rust library is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{_at_fault(path)}: its tokenizer cannot be loaded ({one_line(error)})") from error
    tokenizer.name_or_path = str(path)
    return tokenizer


def _stand_in_config(path: Path) -> dict[str, Any]:
    """The argument `config` for AutoTokenizer if transformers does not know the model type in config.json, else no
    argument. The config.json of an original checkpoint does not describe its tokenizer, and transformers fails on one
    with Llama 3.1's RoPE scaling."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    content = read_json_if_there(path / "config.json")
    kind, tokenizer_class = content.get("model_type"), content.get("tokenizer_class")
    if not content or (isinstance(kind, str) and kind in CONFIG_MAPPING):
        return {}
    settings: dict[str, Any] = {"tokenizer_class": tokenizer_class if isinstance(tokenizer_class, str) else None}
    return {"config": PreTrainedConfig(**settings)}


@contextlib.contextmanager
def _without_marks(path: Path) -> Iterator[Path]:
    """The directory, or a copy of its tokenizer files without byte order marks if one has such a mark, which
    transformers does not accept."""
    files = [path / name for name in _READ if (path / name).is_file()]
    if not any(_starts_with_mark(file) for file in files):
        yield path
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in files:
            (Path(copy) / file.name).write_bytes(file.read_bytes().removeprefix(_MARK))
        yield Path(copy)


def _starts_with_mark(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(len(_MARK)) == _MARK


def _at_fault(path: Path) -> Path:
    """The file that keeps a tokenizer from loading, or the directory if unknown. Raises CheckpointError for a file that
    is not JSON."""
    from tokenizers import Tokenizer

    for name in ("tokenizer.json", "vocab.json"):
        if (path / name).is_file():
            read_json(path / name)
    if (path / "tokenizer.json").is_file():
        try:
            Tokenizer.from_file(str(path / "tokenizer.json"))
        except BaseException:
            return path / "tokenizer.json"
        return path / "tokenizer_config.json"
    return next((path / name for name in _VOCABULARIES if (path / name).is_file()), path)
