"""The path from uint8 tiles to the decoder's inputs, replayed from CUDA graphs, one for each bucket of sizes.

Between capture and replay only the contents of two static tensors change: the tiles and the plan's integers. Opt-in:
not measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava_fast.inputs.plan.buckets import Bucket, bucket_of, fill
from llava_fast.models.batch import Batch
from llava_fast.models.cuda_graphs import addresses_of, capture
from llava_fast.models.quantised import table_of
from llava_fast.models.vlm import LlavaModel
from llava_fast.ops import backend


@dataclass
class _Captured:
    weights: tuple[int, ...]
    batch: Batch
    out: Tensor
    graph: torch.cuda.CUDAGraph


class EncodeGraphs:
    """`graphs(batch)` is `model.inputs_embeds(batch)` without gradients, from a graph captured for the batch's bucket.

    A bucket is captured at its first use with each tile format and requested backend, and again after weights were
    replaced (a graph holds addresses, so in-place changes are seen). Each graph keeps its memory pool, and none is
    dropped; the returned rows are a view of it, which the next call for the same bucket overwrites. Raises ValueError
    for a model that is not on CUDA or a plan that pools rows (pooled video, anyres_max) or has images of native sizes:
    call model.inputs_embeds for those.
    """

    def __init__(self, model: LlavaModel) -> None:
        if model.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a model on CUDA, this one is on {model.device}")
        self.model = model
        self.captured: dict[tuple, _Captured] = {}

    def __call__(self, batch: Batch) -> Tensor:
        # Not in inference mode, whose tensors (the static ones, were a graph captured in it) nothing else may write.
        with torch.cuda.device(self.model.device), torch.inference_mode(False), torch.no_grad():
            return self._run(batch)

    def _run(self, batch: Batch) -> Tensor:
        bucket = bucket_of(batch.plan)
        filled = fill(batch.plan, bucket)
        key = graph_key(batch, bucket)
        found = self.captured.get(key)
        if found is None or found.weights != weight_addresses(self.model):
            found = None  # free the old graph's memory before the next capture
            self.captured.pop(key, None)
            found = self.captured[key] = self._capture(filled_batch(batch, bucket))
        found.batch.tiles[: len(batch.tiles)].copy_(batch.tiles)
        found.batch.flat.copy_(torch.from_numpy(filled.flat).pin_memory(), non_blocking=True)
        found.graph.replay()
        return found.out[: batch.plan.rows]

    def _capture(self, batch: Batch) -> _Captured:
        graph, out = capture(lambda: self.model.inputs_embeds(batch))
        return _Captured(weight_addresses(self.model), batch, out, graph)


def weight_addresses(model: LlavaModel) -> tuple[int, ...]:
    """Addresses of everything that the path to the decoder's inputs reads; they change if a weight is replaced."""
    found = [table_of(model.decoder.embed_tokens).data_ptr()]
    if model.config.has_newline:
        found.append(model.image_newline.data_ptr())
    return (*found, *addresses_of(model.vision_tower), *addresses_of(model.projector))


def graph_key(batch: Batch, bucket: Bucket) -> tuple:
    """The key of a graph: sizes, the tiles' format (uint8 or normalised, planar or patch rows), the backend."""
    return bucket, batch.tiles.dtype, batch.tiles.shape[1:], backend.requested()


def filled_batch(batch: Batch, bucket: Bucket) -> Batch:
    """The batch padded to a bucket (inputs.plan.buckets): tiles of zeros, rows with index -1."""
    plan = fill(batch.plan, bucket)
    tiles = batch.tiles.new_zeros(bucket.tiles, *batch.tiles.shape[1:])
    tiles[: len(batch.tiles)] = batch.tiles
    return Batch(tiles, plan, torch.from_numpy(plan.flat).to(batch.tiles.device))
