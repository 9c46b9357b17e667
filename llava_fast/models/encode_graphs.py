"""The path from uint8 tiles to the decoder's inputs, replayed from CUDA graphs, one for each bucket of sizes.

Between capture and replay only the contents of two static tensors change: the tiles and the plan's integers. The runner
encodes this way on CUDA (`encode`). Not measured on a GPU yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava_fast.inputs.plan.buckets import Bucket, bucket_of, fill
from llava_fast.models.batch import Batch
from llava_fast.models.blocks.watch import Watch
from llava_fast.models.cuda_graphs import Captures, capture
from llava_fast.models.eight_bit import EightBitLinear
from llava_fast.models.vlm import LlavaModel
from llava_fast.ops import backend

MOST_GRAPHS = 16
INSTEAD = "the modules of such batches run one by one"


@dataclass
class _Captured:
    batch: Batch
    out: Tensor
    replay: Callable[[], None]


class EncodeGraphs:
    """`graphs(batch)` is `model.inputs_embeds(batch)` without gradients, from a graph captured for the batch's bucket.

    A bucket is captured at its first use with each tile format and requested backend, and again after a module, a hook
    or the place of a weight has changed (a graph holds addresses, so in-place changes are seen). Each graph keeps its
    memory pool; of MOST_GRAPHS, the one used longest ago is dropped. The returned rows are a view of it, which the next
    call for the same bucket overwrites. Raises ValueError for a model that is not on CUDA or a plan that pools rows
    (pooled video, anyres_max) or has images of native sizes, RuntimeError for a bucket that cannot be captured: call
    model.inputs_embeds for those, or `encode`, which does.

    unfit   why no graph can stand for this model's modules; None if one can.
    failed  why a bucket has none, by `graph_key`: its first batch or its capture has failed (logged). It is not tried
            again until a module changes. All other graphs stay, but at MOST_GRAPHS the one used longest ago is dropped
            before a capture, even one that then fails.
    """

    devices: ClassVar = ("cuda",)

    def __init__(self, model: LlavaModel) -> None:
        if model.device.type not in self.devices:
            raise ValueError(f"CUDA graphs need a model on CUDA, this one is on {model.device}")
        self._model = weakref.ref(model)  # so that one kept for the model's next call does not keep the model
        self._watched = _modules_of(model)
        self._watch = Watch(*self._watched)
        self._rounded = _eight_bit(self._watched)
        self.unfit: str | None = None
        self._met: set[tuple] = set()
        self.graphs: Captures[_Captured] = Captures(MOST_GRAPHS)

    @property
    def model(self) -> LlavaModel:
        model = self._model()
        assert model is not None, "the model is gone"
        return model

    @property
    def failed(self) -> dict[Hashable, str]:
        return self.graphs.failed

    def encode(self, batch: Batch) -> Tensor:
        """model.inputs_embeds(batch) without gradients, [rows, width], the caller's own: from a graph if one can stand
        for the modules. The first batch of a bucket runs them, filled up as the graph will be: so the ops are proven
        for its calls (see ops/selection). After a change of the modules the capture's warm-up proves them."""
        with torch.no_grad():
            rows = self._from_graph(batch) if self._serves(batch) else None
            return self.model.inputs_embeds(batch) if rows is None else rows

    def _from_graph(self, batch: Batch) -> Tensor | None:
        bucket = bucket_of(batch.plan)
        key = graph_key(batch, bucket)
        if key in self.failed:
            return None
        try:
            if key in self._met:
                rows = self._run(batch, bucket, key)
                return None if rows is None else rows.clone()
            self._met.add(key)
            return self.model.inputs_embeds(filled_batch(batch, bucket))[: batch.plan.rows]
        except Exception as error:  # such as no memory for the padding
            self.graphs.fail(key, f"{_what(bucket)} failed: {error!r}", INSTEAD)
            return None

    def _serves(self, batch: Batch) -> bool:
        plan, vision = batch.plan, self.model.config.vision
        if self.model.config.projector.reads_images:
            return False
        if not plan.tiles or plan.pools or plan.grids or vision.by_modality or "instruction" in plan.sections:
            return False
        if nn.modules.module._has_any_global_hook() or torch.is_autocast_enabled(self.model.device.type):
            return False  # autocast chooses dtypes anew, and frees its casts at its end
        self._follow_changes()
        return self.unfit is None

    def _follow_changes(self) -> None:
        """Drop all graphs if the modules or weights have changed since capture."""
        modules = _modules_of(self.model)
        if any(now is not then for now, then in zip(modules, self._watched, strict=True)):
            self._watched, self._watch = modules, Watch(*modules)
        for each in self._rounded:
            each.follow_weight()  # its codes, where the weight has changed in place, lie elsewhere then
        newline = (self.model.image_newline.data_ptr(),) if self.model.config.has_newline else ()
        if self._watch.changed(*newline):
            self.graphs.clear()
            self.unfit = self._watch.unfit
            self._rounded = _eight_bit(self._watched)

    def __call__(self, batch: Batch) -> Tensor:
        self._follow_changes()
        bucket = bucket_of(batch.plan)
        key = graph_key(batch, bucket)
        rows = self._run(batch, bucket, key)
        if rows is None:
            raise RuntimeError(self.failed[key])
        return rows

    # Not in inference mode, whose tensors (the static ones, were a graph captured in it) nothing else may write.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self, batch: Batch, bucket: Bucket, key: tuple) -> Tensor | None:
        filled = fill(batch.plan, bucket)
        found = self.graphs.get(key, lambda: self._captured(filled_batch(batch, bucket)), _what(bucket), INSTEAD)
        if found is None:
            return None
        flat = torch.from_numpy(filled.flat)
        found.batch.tiles[: len(batch.tiles)].copy_(batch.tiles)
        found.batch.flat.copy_(flat.pin_memory() if batch.tiles.is_cuda else flat, non_blocking=True)
        found.replay()
        return found.out[: batch.plan.rows]

    def _captured(self, batch: Batch) -> _Captured:
        model = self.model
        replay, out = self.capture(lambda: model.inputs_embeds(batch))
        return _Captured(batch, out, replay)

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(a function that replays `run`, its output tensor)."""
        with torch.cuda.device(self.model.device):
            graph, out = capture(run)
        return graph.replay, out


def _modules_of(model: LlavaModel) -> tuple[nn.Module, ...]:
    """The modules that a graph stands for."""
    return model.vision_tower, model.projector, model.decoder.embed_tokens


def _eight_bit(modules: Iterable[nn.Module]) -> list[EightBitLinear]:
    return [each for module in modules for each in module.modules() if isinstance(each, EightBitLinear)]


def _what(bucket: Bucket) -> str:
    return f"encoding up to {bucket.tiles} tiles and {bucket.rows} rows"


def graph_key(batch: Batch, bucket: Bucket) -> tuple:
    """The key of a graph: sizes, the tiles' format (uint8 or normalised, planar or patch rows), the backend."""
    return bucket, batch.tiles.dtype, batch.tiles.shape[1:], backend.requested()


def filled_batch(batch: Batch, bucket: Bucket) -> Batch:
    """The batch padded to a bucket (inputs.plan.buckets): tiles of zeros, rows with index -1."""
    plan = fill(batch.plan, bucket)
    tiles = batch.tiles.new_zeros(bucket.tiles, *batch.tiles.shape[1:])
    tiles[: len(batch.tiles)] = batch.tiles
    return Batch(tiles, plan, torch.from_numpy(plan.flat).to(batch.tiles.device))
