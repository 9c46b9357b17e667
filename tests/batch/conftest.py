"""A tiny model in a batch, and runs that need no model."""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_fast.batch import job
from llava_fast.batch.answering import Settings
from llava_fast.batch.source import open_source
from llava_fast.generation.sampling import Sampling
from tests.support import tiny

TOKENS = 6


@dataclass(frozen=True)
class Held(job.ModelSpec):
    """A model that is loaded already."""

    path: str = "tiny"
    options: dict[str, Any] = field(default_factory=dict)
    model: Any = None

    def load(self) -> Any:
        return self.model

    def about(self) -> dict[str, Any]:
        return {"MODEL": self.path}


@pytest.fixture(scope="session")
def model():
    return tiny.pair("next").ours


@pytest.fixture(scope="session")
def spec(model):
    return Held(model=model)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of nine pictures of several sizes, some of them below."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for number in range(9):
        name = f"below/{number}.png" if number % 4 == 1 else f"{number}.png"
        Image.fromarray(tiny.picture(40 + 7 * number, 90 - 5 * number, number)).save(folder / name)
    return folder


def settings(**changes: Any) -> Settings:
    sampling = {"max_new_tokens": TOKENS, "seed": 3, **changes.pop("sampling", {})}
    return Settings(**{"prompt": "hello", "sampling": Sampling(**sampling), **changes})


def answer(spec, input: Path | str, output: Path, *, columns: dict | None = None, **changes: Any) -> job.Result:
    """Run a batch; `columns` are open_source's, `changes` those of `run` and of Settings."""
    of_run = {name: changes.pop(name) for name in ("limit", "overwrite", "runs") if name in changes}
    return job.run(
        spec, open_source(str(input), **(columns or {})), str(output), settings(**changes), say=print, **of_run
    )


def read(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def write_csv(path: Path, rows: list[dict], **options: Any) -> Path:
    with open(path, "w", newline="", **{"encoding": "utf-8", **options}) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, columns: dict[str, list], **options: Any) -> Path | None:
    """None without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def made_up(spec, settings, source, first, limit, output):
    """Rows without a model, as a run gives them: in an order of its own. The first to start is the last to end."""
    items = [item for item in source.items(first) if item.number not in output][:limit]
    late = items.pop(0)
    random.Random(len(items)).shuffle(items)
    for item in [*items, late]:
        yield [(item.number, {"id": item.id, "answer": f"of {item.id}: ünïcode " + "x" * (item.number % 7)})]
        yield []
