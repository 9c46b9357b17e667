"""The vLLM plugin without vLLM: entry point, switch, fallback, tiles, tensors. test_vllm_real.py has vLLM itself."""

import ast
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, GemmaConfig, PixtralVisionConfig

import llava_fast
from llava_fast.errors import CheckpointError, RequestError
from llava_fast.families.llava_names import LLAVA_NAMES, to_stored
from llava_fast.inputs.tiling.anyres import image_rows
from llava_fast.integrations import vllm as plugin
from llava_fast.integrations.vllm.checkpoint import Loader, Unserved, read_visual
from llava_fast.integrations.vllm.tiles import TileProcessor
from llava_fast.models.config import VisualConfig
from llava_fast.models.visual import VisualModel
from tests.support import tiny

ROOT = Path(llava_fast.__file__).parent
NAMES = {"llava15": "llava", "next": "llava_next", "video": "llava_next_video", "onevision": "llava_onevision"}


# ---------------------------------------------------------------- the entry point


def test_the_entry_point_is_declared():
    text = (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")
    entry = '[project.entry-points."vllm.general_plugins"]\nllava_fast = "llava_fast.integrations.vllm:register"'
    assert entry in text
    assert callable(plugin.register)


def test_one_file_imports_vllm():
    """At a module's top level. `register` imports it when vLLM calls, and the registry's strings import `models`."""
    importers = set()
    texts = {file: file.read_text(encoding="utf-8") for file in ROOT.rglob("*.py")}
    for file, text in texts.items():
        for node in ast.parse(text).body if "vllm" in text else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == "vllm" for name in names):
                importers.add(file.relative_to(ROOT).as_posix())
    assert importers == {"integrations/vllm/classes.py"}


@pytest.fixture
def stub(monkeypatch):
    """A vLLM of the tried version with a registry and LLaVA classes, and nothing else."""
    registered = {}
    made = types.ModuleType("vllm")
    made.__version__ = plugin.TRIED[1] + ".1"
    made.ModelRegistry = types.SimpleNamespace(register_model=registered.__setitem__)
    made.registered = registered
    monkeypatch.setitem(sys.modules, "vllm", made)
    for name in ("vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, module in plugin.ARCHITECTURES.items():
        path = f"vllm.model_executor.models.{module}"
        inside = types.ModuleType(path)
        setattr(inside, name, type(name, (), {}))
        monkeypatch.setitem(sys.modules, path, inside)
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    monkeypatch.setenv(plugin._TOLD, "")
    return made


def test_four_classes_are_registered_as_strings(stub, caplog):
    plugin.register()
    expected = {name: f"llava_fast.integrations.vllm.models:{name}" for name in plugin.ARCHITECTURES}
    assert stub.registered == expected
    assert "llava_fast.integrations.vllm.classes" not in sys.modules
    assert not caplog.records


def test_the_switch_turns_it_off(stub, monkeypatch):
    monkeypatch.setenv("LLAVA_FAST_VLLM", "0")
    plugin.register()
    assert not stub.registered


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0rc1", "1.0"])
def test_an_untried_version_is_named_once(stub, version, caplog):
    stub.__version__ = version
    plugin.register()
    plugin.register()  # as vLLM does in each of its processes, which inherit the environment
    assert len(stub.registered) == 4
    assert [record.message for record in caplog.records] == [
        f"vLLM {version} is untried: llava_fast was tested with 0.32 to 0.33. LLAVA_FAST_VLLM=0 leaves vLLM as it is"
    ]


def test_a_registry_of_another_kind_leaves_vllm_alone(stub, caplog):
    del stub.ModelRegistry
    plugin.register()
    assert "vLLM's own LLaVA classes stay: ImportError" in caplog.text


def test_an_api_of_another_kind_leaves_vllms_classes(stub, monkeypatch, caplog):
    for name in ("models", "classes"):
        monkeypatch.delitem(sys.modules, f"llava_fast.integrations.vllm.{name}", raising=False)
    from llava_fast.integrations.vllm import models

    monkeypatch.delitem(sys.modules, "llava_fast.integrations.vllm.models")
    for name, module in plugin.ARCHITECTURES.items():
        assert getattr(models, name) is getattr(sys.modules[f"vllm.model_executor.models.{module}"], name)
    (record,) = caplog.records
    assert "vLLM's own LLaVA classes stay: its API differs (ModuleNotFoundError: No module named" in record.message


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize("name", NAMES)
def test_tiles_are_the_checkpoints(name):
    model = tiny.pair(name).ours
    process = TileProcessor(model.config.geometry, "<image>", None)
    images = [tiny.picture(60, 90), tiny.picture(200, 31)]
    made = process(text="ignored", images=[Image.fromarray(images[0]), images[1]], return_tensors="pt")
    for image, tiles in zip(images, made["pixel_values"], strict=True):
        expected = model.processor.tiles(image)
        assert tiles.dtype == torch.uint8
        assert np.array_equal(tiles.numpy(), expected[0] if name == "llava15" else expected)
    if name != "llava15":
        assert made["image_sizes"].tolist() == [[60, 90], [200, 31]]


@pytest.mark.parametrize("name", ["video", "onevision"])
def test_videos_come_in_each_of_vllms_forms(name):
    model = tiny.pair(name).ours
    process = TileProcessor(model.config.geometry, "<image>", "<video>")
    frames = np.stack([tiny.picture(60, 90, seed) for seed in range(3)])
    expected = model.prepare([{"prompt": "<video>", "video": list(frames)}]).tiles
    pictures = [Image.fromarray(frame) for frame in frames]
    for video in (frames, [frames], (frames, {"fps": 2}), [(frames, None)], pictures, [pictures]):
        (made,) = process(videos=video)["pixel_values_videos"]
        assert torch.equal(made, expected)
    two = process(videos=[frames, frames[:2]])["pixel_values_videos"]
    assert [len(video) for video in two] == [3, 2]


def test_arrays_of_each_layout_are_read():
    process = TileProcessor(tiny.pair("llava15").ours.config.geometry, "<image>", None)
    image = tiny.picture(60, 90)
    expected = process(images=[image])["pixel_values"]
    for other in (np.moveaxis(image, -1, 0), torch.from_numpy(image), torch.from_numpy(image).permute(2, 0, 1)):
        assert torch.equal(process(images=[other])["pixel_values"], expected)
    grey = image[..., :1]
    assert torch.equal(process(images=grey)["pixel_values"], process(images=grey[..., 0])["pixel_values"])


def test_options_of_a_processor_are_refused_by_name():
    process = TileProcessor(tiny.pair("llava15").ours.config.geometry, "<image>", None)
    with pytest.raises(RequestError, match="mm_processor_kwargs asks for do_pad: leave it out"):
        process(images=[tiny.picture(9, 9)], do_pad=True)


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of tiny checkpoints in Hugging Face's layout, by model type."""
    folder = tmp_path_factory.mktemp("served")
    for name, kind in NAMES.items():
        llava_fast.save(tiny.pair(name).ours, folder / kind)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_visual_half_is_read(saved, name):
    path, model = saved / NAMES[name], tiny.pair(name).ours
    visual = read_visual(str(path), None, AutoConfig.from_pretrained(path))
    assert (visual.config.geometry, visual.config.projector) == (model.config.geometry, model.config.projector)
    assert visual.config.vision.num_layers == model.config.vision.layers_needed < model.config.vision.num_layers


def test_decoder_and_quantisation_are_vllms_affair(saved):
    hf = AutoConfig.from_pretrained(saved / "llava_next")
    expected = read_visual(str(saved / "llava_next"), None, hf).config
    hf.text_config = GemmaConfig(hidden_size=hf.text_config.hidden_size)
    hf.quantization_config = {"quant_method": "unheard_of"}
    assert read_visual(str(saved / "llava_next"), None, hf).config == expected


def test_what_cannot_be_read_is_left_to_vllm(saved):
    hf = AutoConfig.from_pretrained(saved / "llava_next")
    with pytest.raises(Unserved, match="neither a local directory nor an accessible Hub repository"):
        read_visual("nobody/nothing", None, hf)
    hf.vision_config = PixtralVisionConfig()
    with pytest.raises(Unserved, match=r"vision_config\.model_type is 'pixtral'"):
        read_visual(str(saved / "llava_next"), None, hf)
    with pytest.raises(Unserved, match="its model_type is 'gemma'"):
        read_visual(str(saved / "llava_next"), None, GemmaConfig())


def empty(config: VisualConfig) -> VisualModel:
    return VisualModel(config).requires_grad_(False)


@pytest.mark.parametrize("spelling", ["hf", "hf5", "original"])
@torch.no_grad()
def test_tensors_of_each_spelling_go_where_they_belong(saved, spelling):
    model = tiny.pair("next").ours
    stored = {to_stored(name, spelling): tensor for name, tensor in model.named_parameters()}
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(1)
    read = read_visual(str(saved / "llava_next"), None, AutoConfig.from_pretrained(saved / "llava_next"))
    alone = empty(read.config)
    loader = Loader(alone, read.names)
    rest = dict(loader.rest(stored.items()))
    own = {to_stored(name, "hf"): tensor for name, tensor in model.named_parameters() if name.startswith("decoder.")}
    assert rest.keys() == own.keys()
    assert all(rest[name] is tensor for name, tensor in own.items())
    assert not loader.missing()
    image = tiny.picture(60, 90)
    rows = image_rows(model.config.geometry, 60, 90)
    tiles = torch.from_numpy(model.processor.tiles(image))
    (found,) = alone.visual_embeds(tiles, [rows])
    batch = model.prepare([{"prompt": "<image>", "images": [image]}])
    expected = model.inputs_embeds(batch)[batch.column("source") != 0]
    assert torch.equal(found, expected)  # though the layers that never run are gone


def test_tensors_that_do_not_fit_are_named(saved):
    read = read_visual(str(saved / "llava_next"), None, AutoConfig.from_pretrained(saved / "llava_next"))
    name = "multi_modal_projector.linear_1"
    loader = Loader(empty(read.config), read.names)
    for tensor, found in ((torch.ones(3, 3), r"torch.float32 \[3, 3\]"), (torch.ones(64, 32).char(), "torch.int8")):
        with pytest.raises(CheckpointError, match=rf"'{name}.weight' is {found}.*have \[64, 32\]; LLAVA_FAST_VLLM=0"):
            list(loader.rest([(f"{name}.weight", tensor)]))
    with pytest.raises(CheckpointError, match=r"weight_scale' is .* have no such tensor"):
        list(loader.rest([(f"{name}.weight_scale", torch.ones(1))]))
    assert "projector.layers.0.weight" in loader.missing()
    unknown = [("language_model.transformer.h.0.weight", torch.ones(1))]
    assert list(loader.rest(unknown)) == unknown  # a decoder that only vLLM knows


def test_without_a_tower_its_tensors_are_left_out():
    """vLLM builds none if a prompt may hold no image."""
    stored = {to_stored(name, "hf"): tensor for name, tensor in tiny.pair("next").ours.named_parameters()}
    loader = Loader(None, LLAVA_NAMES)
    assert all(name.startswith("language_model.") for name, _ in loader.rest(stored.items()))
    assert not loader.missing()
