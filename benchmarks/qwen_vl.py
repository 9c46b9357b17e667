"""Qwen-VL's and Monkey's path from a picture to the decoder's rows beside the published code: time and peak memory, in
one process, in turns.

    python -m benchmarks.qwen_vl --published Monkey/monkey_model/visual.py --layers 2 --output-json out.json

`visual.py` is the published file (github.com/Yuliang-Liu/Monkey 498e1d9), which holds both towers; torchvision's three
transforms in it are replaced by the same steps with Pillow and torch. Widths are the published ones (1664, 16 heads,
MLP 8192, 256 queries of 4096, windows of 448 pixels), the tower has fewer layers, weights are random and the same on
both sides. No figure is printed unless both give the same rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import machine
from benchmarks.memory import PeakMemory
from benchmarks.timing import Timed, time_in_turns
from llava_fast.inputs.pictures.tiles import make_tiles
from llava_fast.inputs.tiling.anyres import VisualGeometry, image_views
from llava_fast.inputs.tiling.grid import GridTiling
from llava_fast.models.connectors.perceiver import Perceiver, PerceiverConfig
from llava_fast.models.towers.qwen_vit import QwenVit, QwenVitConfig

WIDTH, OUT = 1664, 4096


def published(file: Path) -> Any:
    """The module of visual.py, with stand-ins for what it imports but this machine may lack."""

    def resize(size: tuple[int, int], interpolation: Any) -> Callable:
        return lambda image: image.resize(size[::-1], Image.Resampling.BICUBIC)

    def normalise(mean: Any, std: Any) -> Callable:
        centre, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
        return lambda pixels: (pixels - centre) / scale

    def compose(steps: list[Callable]) -> Callable:
        def run(image: Any) -> Any:
            for step in steps:
                image = step(image)
            return image

        return run

    transforms: Any = types.ModuleType("torchvision.transforms")
    transforms.Compose, transforms.Resize, transforms.Normalize = compose, resize, normalise
    transforms.ToTensor = lambda: lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255
    transforms.InterpolationMode = types.SimpleNamespace(BICUBIC=None)
    torchvision: Any = types.ModuleType("torchvision")
    torchvision.transforms = transforms
    sys.modules |= {"torchvision": torchvision, "torchvision.transforms": transforms}
    spec = importlib.util.spec_from_file_location("published_visual", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(windows: int, layers: int) -> tuple[QwenVit, Perceiver, VisualGeometry]:
    vision = QwenVitConfig(
        hidden_size=WIDTH,
        num_layers=layers,
        image_size=448 if windows == 1 else 896,
        patch_size=14,
        feature_layers=(-1,),
        intermediate_size=int(WIDTH * 4.9231),
        num_heads=16,
        activation="gelu",
        layer_norm_eps=1e-6,
        windows=windows,
    )
    pool = PerceiverConfig(WIDTH, OUT, OUT // 128, 16, vision.side, own_positions=True, views=vision.views)
    tiling = GridTiling(1, 1, False)
    geometry = VisualGeometry(vision.image_size, 14, compat="llava", tile_rows=256 * vision.views, tiling=tiling)
    return vision.build().eval(), pool.build().eval(), geometry


def sides(module: Any, windows: int, layers: int, picture: Path) -> dict[str, Callable[[int], Tensor]]:
    """What each side computes: rows [1, 256 or 1280, 4096] of one picture, opened and resized each time."""
    torch.manual_seed(0)
    tower, pool, geometry = build(windows, layers)
    options = {"image_size": geometry.tile_size, "patch_size": 14, "width": WIDTH, "layers": layers, "heads": 16}
    sets = windows if windows > 1 else 0
    theirs = module.VisionTransformer(**options, mlp_ratio=4.9231, output_dim=OUT, lora_repeat_num=sets).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_b" in name:
                parameter.normal_(0, 0.02)
    state = theirs.state_dict()
    in_pool = ("attn_pool.", "ln_post.", "proj")
    tower.load_state_dict({name: value for name, value in state.items() if not name.startswith(in_pool)})
    pool.load_state_dict({k.removeprefix("attn_pool."): v for k, v in state.items() if k.startswith(in_pool)})

    def ours(_: int) -> Tensor:
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        views = image_views(geometry, *pixels.shape[:2])
        return pool(tower(torch.from_numpy(make_tiles(pixels, views, geometry.tile_size))))

    def reference(_: int) -> Tensor:
        if windows == 1:
            image = theirs.image_transform(Image.open(picture).convert("RGB"))
            return theirs(image[None])
        cut, whole = theirs.encode([str(picture)])
        patches = [patch for row in cut for patch in row]
        parts = [theirs(patch, idx=number) for number, patch in enumerate(patches)]
        return torch.cat([*parts, theirs(whole)], dim=1)

    return {"llava_fast": ours, "published": reference}


@torch.inference_mode()
def measure(module: Any, windows: int, layers: int, picture: Path, iters: int) -> list[dict]:
    found = sides(module, windows, layers, picture)
    made = {name: run(0) for name, run in found.items()}
    error = float((made["llava_fast"] - made["published"]).abs().max() / made["published"].abs().max())
    if error > 1e-4:
        raise SystemExit(f"the rows differ by {error:.1e} of the largest, so there is nothing to compare")
    del made
    peaks = {}
    for name, run in found.items():
        with PeakMemory(torch.device("cpu")) as peak:
            run(0)
        peaks[name] = peak.bytes
    times = time_in_turns([Timed(run) for run in found.values()], iters, 0.0, torch.device("cpu"), blocks=iters)
    rows = []
    for (name, peak_bytes), seconds in zip(peaks.items(), times, strict=True):
        system = "Monkey" if windows > 1 else "Qwen-VL"
        row: dict[str, Any] = {"system": system, "side": name, "error": error, "samples": seconds.samples}
        row |= {"seconds": round(seconds.median, 4), "p20": round(seconds.p20, 4), "p80": round(seconds.p80, 4)}
        rows.append(row | {"peak_mib": None if peak_bytes is None else round(peak_bytes / 2**20)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, required=True, help="The published visual.py.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--output-json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    about = {"machine": machine.describe("cpu", chosen.threads)}
    module = published(chosen.published)
    rows = []
    for windows in (1, 4):
        rows += measure(module, windows, chosen.layers, chosen.picture, chosen.iters)
        for row in rows[-2:]:
            print(row, flush=True)
    if chosen.output_json:
        about |= {"versions": machine.versions(), "commit": machine.commit()}
        settings = {"layers": chosen.layers, "iters": chosen.iters, "dtype": "float32"}
        result = {"schema": "llava_fast-visual-path-benchmark/1", **about, "settings": settings, "rows": rows}
        chosen.output_json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
