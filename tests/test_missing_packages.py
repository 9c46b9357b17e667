"""Without an optional package, one line says what needs it and names the extra that brings it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_fast.batch import cluster, readers
from llava_fast.calibration import compressor
from llava_fast.cli.main import main
from llava_fast.datagen import nouns, ocr
from llava_fast.demo import canvas
from llava_fast.endpoint import asking
from llava_fast.errors import LlavaFastError
from llava_fast.evaluate import lmms
from llava_fast.evaluate.model import ModelSpec
from llava_fast.generation.grammar import Grammar, GrammarMask
from llava_fast.inputs.pictures import video as videos
from llava_fast.ops import backend
from llava_fast.serve import server
from llava_fast.train import lora, metrics, plot
from llava_fast.train.data import check
from llava_fast.train.objectives import reference

OPTIONAL = ("sklearn", "matplotlib", "av", "peft", "accelerate", "tensorboard", "xformers", "torchvision", "lmms_eval")
OPTIONAL += (
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "llguidance",
    "openai",
    "textblob",
    "rapidocr",
    "pyarrow",
    "ray",
    "llmcompressor",
)
BUILD = ("ninja", "pybind11", "setuptools")


def hide(patch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these packages were not installed."""
    for name in [*sys.modules]:
        if name.partition(".")[0] in names:
            patch.delitem(sys.modules, name)
    for name in names:
        patch.setitem(sys.modules, name, None)


@pytest.fixture
def alone(monkeypatch):
    caches = (canvas._scans, canvas._glyphs, canvas._photos, backend._has_triton)
    for cached in caches:
        cached.cache_clear()
    hide(monkeypatch, *OPTIONAL, *BUILD, "triton")
    yield monkeypatch
    for cached in caches:
        cached.cache_clear()


def adapters_off():
    with reference.adapters_off(torch.nn.Linear(1, 1)):
        pass


def with_triton():
    with backend.use_backend("triton"):
        backend.choose("rms_norm", "cpu")


USES = {
    "scans": (canvas._scans, "demo"),
    "photos": (canvas._photos, "demo"),
    "a video": (lambda: videos.read_video("film.mp4"), "video"),
    "a picture of curves": (lambda: plot.save_curves({}, Path("curves.png")), "plot"),
    "a histogram": (lambda: check.save_histogram(None, Path("lengths.png")), "plot"),
    "a picture to come": (lambda: check.check_picture_path(Path("lengths.png")), "plot"),
    "adapters": (lambda: lora._peft_config(SimpleNamespace()), "train"),
    "a grammar": (lambda: GrammarMask(Grammar.json(), None, 1, ()), "serve"),
    "an endpoint": (asking._openai, "endpoint"),
    "a task of lmms-eval": (lambda: lmms.evaluate(ModelSpec("model"), ["lmms:mme"], None, 1), "lmms-eval"),
    "noun phrases": (lambda: nouns.tagger("textblob"), "data"),
    "text in pictures": (lambda: ocr.engine("rapidocr"), "ocr"),
    "a batch of a parquet file": (lambda: list(readers.read_rows("rows.parquet", 0)), "parquet"),
    "a batch on Ray": (cluster.check_ray, "ray"),
    "calibration": (compressor.check_installed, "calibrate"),
    "a server": (server.check_packages, "serve"),
    "a base without adapters": (adapters_off, "train"),
}


@pytest.mark.parametrize("use", USES)
def test_one_line_names_the_extra(use, alone):
    call, extra = USES[use]
    with pytest.raises(LlavaFastError) as caught:
        call()
    assert f"pip install 'llava_fast[{extra}]'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert f"\n{extra} = [" in (Path(__file__).parent.parent / "pyproject.toml").read_text()


def test_the_demo_ends_in_one_line(alone, capsys):
    alone.setattr(sys, "argv", ["llava-fast", "demo"])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert caught.value.code == 1
    assert said.err == "error: the digits demo needs scikit-learn: pip install 'llava_fast[demo]'\n"


def test_the_triton_backend_without_triton(alone):
    with pytest.raises(backend.BackendError, match="'triton' needs triton, which is not installed"):
        with_triton()


def test_a_run_without_tensorboard_goes_on(alone, capsys, tmp_path):
    hide(alone, "torch.utils.tensorboard")
    assert metrics._tensorboard(tmp_path, 0) is None
    assert "pip install 'llava_fast[train]'" in capsys.readouterr().out
