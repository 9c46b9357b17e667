"""Reads LLaVA-format data: JSON lists and JSON lines, globs, and LLaVA-NeXT's YAML mixtures.

Files are read once and kept as one buffer of bytes that worker processes share. A sample is validated when it is
accessed; its error names it, and does not hide errors of other samples (`llava-fast data check` lists all).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llava_fast.errors import DataError, RequestError
from llava_fast.inputs.chat.messages import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    messages_from_conversations,
    normalise_messages,
)
from llava_fast.train.data.files import expand, read_text, read_values

READ_KEYS = ("id", "image", "images", "video", "conversations", "messages")
"""The keys of a sample that are read; others are ignored."""

_SAMPLING = re.compile(r"(first|end|random):(\d+|\d+(?:\.\d+)?(?=%))(%?)")


def _checked_sampling(value: str) -> str:
    if value != "all" and not _SAMPLING.fullmatch(value):
        raise ValueError(f"unknown sampling {value!r}: use all, first:100, end:100, random:100, or a share: first:10%")
    return value


class Source(BaseModel):
    """One entry of a recipe's `data.sources`."""

    model_config = ConfigDict(extra="forbid")

    path: str  # .json or .jsonl; a glob or "{a,b}.json" of such files; or a .yaml mixture in LLaVA-NeXT's format
    images: str = ""  # folder to which image and video paths are relative; default: that of the data file
    sampling: str = "all"  # the first, the last or a random part of it: "first:1000", "end:10%", "random:5%"
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)  # occurrences per epoch: 0.5 is half of it, 2 twice
    cap: int | None = Field(default=None, ge=1)  # most samples of it per epoch
    seed: int = Field(default=0, ge=0)  # for random sampling

    _sampling = field_validator("sampling")(_checked_sampling)


class _MixtureEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    json_path: str
    sampling_strategy: str = "all"

    _sampling = field_validator("sampling_strategy")(_checked_sampling)


class _Mixture(BaseModel):
    """LLaVA-NeXT's YAML format of a training mixture (llava/train/train.py there)."""

    model_config = ConfigDict(extra="forbid")

    datasets: list[_MixtureEntry] = Field(min_length=1)


@dataclass(frozen=True)
class Sample:
    """A training sample: its name in errors, the index of its source, and a request for `Processor.prepare`."""

    name: str
    source: int
    request: dict[str, Any]


class DataFile(NamedTuple):
    """A file of samples: its name in errors, its path, and the folder to which its images are relative."""

    name: str
    path: str
    images: str


@dataclass(frozen=True)
class SampleTable:
    """All samples of a run in a compact form: table[i] is a `Sample`.

    buffer      the samples as concatenated JSON; offsets int64 [n + 1]: the start of each.
    source_of   int32 [n]: index of each sample's source; file_of int32 [n]: index of its file in `files`; place_of
                int32 [n]: its index in that file, from 0.
    image_first the argument of `messages_from_conversations`.
    unread      keys that are ignored -> number of samples that have them.
    oddities    likely mistakes in samples that are still trained on -> number of such samples.
    """

    buffer: bytes
    offsets: np.ndarray
    source_of: np.ndarray
    file_of: np.ndarray
    place_of: np.ndarray
    files: list[DataFile]
    image_first: bool
    unread: dict[str, int]
    oddities: dict[str, int]

    def __len__(self) -> int:
        return len(self.source_of)

    def __getitem__(self, number: int) -> Sample:
        """Raises DataError, naming the sample, if it is invalid."""
        number = range(len(self))[number]  # raises IndexError, which ends iteration
        return self.sample(number, self.value(number))

    def sample(self, number: int, value: Any) -> Sample:
        """Convert `value`, read at sample `number`, to a sample. Raises DataError."""
        name = self._name(number, value)
        try:
            request = _request(value, self.files[self.file_of[number]].images, self.image_first)
        except DataError as error:
            raise DataError(f"{name}: {error}", error.kind) from None
        return Sample(name, int(self.source_of[number]), {**request, "id": name})

    def name(self, number: int) -> str:
        """A sample's name in errors, such as "data.json[12] (id 000123)"."""
        return self._name(number, self.value(number))

    def contents(self) -> str:
        """A hash of the samples that does not depend on the paths of files and images."""
        found = hashlib.blake2b(self.buffer, digest_size=16)
        for part in (self.offsets, self.file_of):
            found.update(part.tobytes())
        return found.hexdigest()

    def identities(self) -> np.ndarray:
        """uint64 [samples]: a hash of each sample and the index of its source, independent of the paths."""
        buffer, ends, sources = memoryview(self.buffer), self.offsets.tolist(), self.source_of.tolist()
        hashes = (
            hashlib.blake2b(buffer[start:end], digest_size=8, salt=source.to_bytes(4, "little")).digest()
            for start, end, source in zip(ends[:-1], ends[1:], sources, strict=True)
        )
        return np.frombuffer(b"".join(hashes), np.uint64)

    def fingerprint(self) -> str:
        """A hash of the samples and of the paths of their images."""
        places = json.dumps([[file.images for file in self.files], self.image_first])
        return hashlib.blake2b((self.contents() + places).encode(), digest_size=16).hexdigest()

    def value(self, number: int) -> Any:
        """A sample's value in the data file, with only the keys that are read."""
        encoded = self.buffer[self.offsets[number] : self.offsets[number + 1]]
        return json.loads(encoded.decode("utf-8", "surrogatepass"))

    def _name(self, number: int, value: Any) -> str:
        name = f"{self.files[self.file_of[number]].name}[{self.place_of[number]}]"
        given = value.get("id") if isinstance(value, dict) else None
        return name if given is None else f"{name} (id {str(given)[:100]})"


def read_sources(
    sources: Sequence[Source],
    image_first: bool = True,
    keys: Sequence[str] = READ_KEYS,
    split: Callable[[Any], list[Any]] | None = None,
) -> SampleTable:
    """Read the files of a run's sources. keys: the keys of a sample to keep; split: returns the samples of one value of
    a file (default: the value itself).

    Raises DataError, naming file, line and column, for a file that is missing or not JSON, and for a source without
    samples. Errors within a sample are raised when it is accessed.
    """
    files: list[DataFile] = []
    rows: list[tuple[bytes, int, int, int]] = []  # sample, source, file, place
    unread: Counter[str] = Counter()
    oddities: Counter[str] = Counter()
    for number, source in enumerate(sources):
        of_source: list[tuple[bytes, int, int, int]] = []
        for part, (paths, sampling) in enumerate(_parts(source.path)):
            of_part = []
            for path in paths:
                folder = os.path.expanduser(source.images) or os.path.dirname(path)
                files.append(DataFile(os.path.basename(path), path, os.path.abspath(folder)))
                for place, read in enumerate(read_values(path)):
                    value = read
                    if isinstance(read, dict):
                        unread.update(read.keys() - keys)
                        value = {key: read[key] for key in keys if read.get(key) is not None}
                        oddities.update(_oddities(value))
                    for sample in [value] if split is None else split(value):
                        text = json.dumps(sample, ensure_ascii=False, separators=(",", ":"))
                        of_part.append((text.encode("utf-8", "surrogatepass"), number, len(files) - 1, place))
            of_source += [of_part[i] for i in _chosen(len(of_part), sampling, [source.seed, part])]
        chosen = _chosen(len(of_source), source.sampling, [source.seed])
        if not len(chosen):
            raise DataError(f"{source.path} has no samples (sampling {source.sampling!r})")
        rows += [of_source[i] for i in chosen]
    if not rows:
        raise DataError("there is nothing to train on: give at least one source of samples")
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row[0]) for row in rows], out=offsets[1:])
    source_of, file_of, place_of = np.array([row[1:] for row in rows], np.int32).T.copy()
    alike = Counter(file.name for file in files)
    files = [file if alike[file.name] == 1 else file._replace(name=file.path) for file in files]
    buffer = b"".join(row[0] for row in rows)
    columns = (offsets, source_of, file_of, place_of)
    return SampleTable(buffer, *columns, files, image_first, dict(unread), dict(oddities))


def _parts(path: str) -> list[tuple[list[str], str]]:
    """(files, sampling) of each part of a source: one part, or one per dataset of a YAML mixture."""
    if not path.lower().endswith((".yaml", ".yml")):
        return [(expand(path), "all")]
    return [part for file in expand(path) for part in _mixture(file)]


def _mixture(path: str) -> list[tuple[list[str], str]]:
    try:
        mixture = _Mixture.model_validate(yaml.safe_load(read_text(path)))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {error}") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'file'}: {each['msg']}" for each in error.errors())
        raise DataError(
            f"{path} is not a mixture ({wrong}): it needs `datasets:`, a list of `json_path:` and `sampling_strategy:`"
        ) from None
    return [(expand(each.json_path, os.path.dirname(path)), each.sampling_strategy) for each in mixture.datasets]


def _chosen(count: int, sampling: str, seed: list[int]) -> np.ndarray:
    """The indices that a sampling selects of `count` samples, in order. A share is rounded up, as in LLaVA-NeXT."""
    found = _SAMPLING.fullmatch(sampling)
    if found is None:
        return np.arange(count)
    kind, amount, percent = found.groups()
    taken = min(count, math.ceil(float(amount) * count / 100) if percent else int(amount))
    if kind == "random":
        return np.sort(np.random.default_rng(seed).permutation(count)[:taken])
    return np.arange(taken) if kind == "first" else np.arange(count - taken, count)


# ---------------------------------------------------------------- samples


def _oddities(value: dict[str, Any]) -> Iterator[str]:
    turns = value.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and isinstance(turns[-1], dict):
        if turns[0].get("from") == "gpt":
            yield "begin with an answer, which is left out as in the original trainers"
        if turns[-1].get("from") == "human":
            yield "end with a question without an answer"


def _request(value: Any, folder: str, image_first: bool) -> dict[str, Any]:
    """The messages, images and video of a sample. Raises DataError."""
    if not isinstance(value, dict):
        raise DataError(f"a sample must be an object with conversations, not {_shown(value)}")
    images = _paths(value, "images" if "images" in value else "image", folder)
    videos = _paths(value, "video", folder)
    if len(videos) > 1:
        raise DataError(f"it has {len(videos)} videos: a sample can have at most one")
    try:
        messages = _messages(value, folder, image_first)
        if videos and not images:  # LLaVA-NeXT marks a video with <image>
            messages = [_marked_as_video(message) for message in messages]
        _check_marks(messages, len(images), len(videos))
    except RequestError as error:
        raise DataError(str(error), "roles and turns") from None
    return {"messages": messages, "images": images, **({"video": videos[0]} if videos else {})}


def _paths(value: dict[str, Any], key: str, folder: str) -> list[str]:
    given = value.get(key)
    listed = given if isinstance(given, list) else [] if given in (None, "") else [given]
    for each in listed:
        if not isinstance(each, str) or not each:
            raise DataError(f"{key!r} must be a path or a list of paths, but has {_shown(each)}")
    return [_located(each, folder) for each in listed]


def _located(path: str, folder: str) -> str:
    """A path joined to its folder. Data URIs are unchanged, and so are web addresses, which raise when opened."""
    return path if re.match(r"data:|https?://", path) else os.path.join(folder, path)


def _messages(value: dict[str, Any], folder: str, image_first: bool) -> list[dict[str, Any]]:
    key = "conversations" if "conversations" in value else "messages"
    turns = value.get(key)
    if not isinstance(turns, list) or not turns:
        what = "no conversations and no messages" if turns is None else f"{_shown(turns)} as its {key}"
        raise DataError(f"it has {what}: it needs a list of turns, {{'from': 'human' or 'gpt', 'value': text}}")
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"{key}[{index}] is {_shown(turn)}: a turn is {{'from': 'human' or 'gpt', 'value': text}}")
    if any(isinstance(turn.get("content"), list) for turn in turns):  # OpenAI's format, with content items
        return _openai_messages(turns, folder)
    return messages_from_conversations(turns, image_first)


def _openai_messages(messages: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Messages with the image paths of their items joined to the sample's folder."""
    normal, sources = normalise_messages(messages)
    supply = iter(sources)
    for message in normal:
        for item in message["content"]:
            for _ in range(item.get("text", "").count(IMAGE_PLACEHOLDER)):
                next(supply)
            source = next(supply) if item["type"] == "image" else None
            if isinstance(source, str):
                item["image"] = _located(source, folder)
    return normal


def _marked_as_video(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return (
        {**message, "content": content.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)}
        if isinstance(content, str)
        else message
    )


def _check_marks(messages: list[dict[str, Any]], images: int, videos: int) -> None:
    """Raise DataError unless every image and video has a placeholder in a question."""
    normal, sources = normalise_messages(messages)
    video_placeholders = 0
    for index, message in enumerate(normal):
        for item in message["content"]:
            text = item.get("text", "")
            video_placeholders += 1 if item["type"] == "video" else text.count(VIDEO_PLACEHOLDER)
            for placeholder in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER) if videos else (IMAGE_PLACEHOLDER,):
                if message["role"] != "user" and placeholder in text:
                    raise DataError(
                        f"message {index} ({message['role']}) has {placeholder}: only a question can", "placeholders"
                    )
    placeholders = sum(source is None for source in sources)
    if placeholders != images:
        raise DataError(
            f"its text has {_some(placeholders, '<image> placeholder')} and it has {_some(images, 'image')}",
            "placeholders",
        )
    if videos and video_placeholders != 1:
        raise DataError(
            f"it has a video and {_some(video_placeholders, 'placeholder')} for it: write <video> once", "placeholders"
        )


def _some(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
