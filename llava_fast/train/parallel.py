"""Distributed training: the process mesh, and how a model is parallelised over it.

The mesh is [data, tensor]: processes along "data" run different samples; those along "tensor" split each decoder layer
for the same samples. Sources: Zhao et al. 2023 (FSDP), Shoeybi et al. 2019 (tensor parallelism).
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from llava_fast.errors import RecipeError
from llava_fast.models.vlm import LlavaModel
from llava_fast.ops.selection.sharing import share
from llava_fast.orphans import end_with_parent

if TYPE_CHECKING:
    from llava_fast.train.recipe import Parallel, Recipe

T = TypeVar("T")
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "columns": ColwiseParallel,
    "rows": RowwiseParallel,
    "shared": lambda: SequenceParallel(sequence_dim=1, use_local_output=True),  # dim 1 of its input is heads
}


@dataclass(frozen=True)
class World:
    """This process among those of a run. rank, size: among the processes that run different samples; mesh: [data,
    tensor], None in a single process."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes the shared files."""
        return self.mesh is None or dist.get_rank() == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over the processes that run different samples, in place."""
        if self.mesh is not None and self.size > 1:
            dist.all_reduce(value, group=self.mesh.get_group("data"))
        return value

    def gather(self, value: Sequence[T]) -> list[Sequence[T]]:
        """The values of all processes; processes that run the same samples are adjacent. If all values are empty, only
        their lengths are exchanged."""
        if self.mesh is None:
            return [value]
        held = torch.tensor([len(value)], device=self.device)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        everyone: list[Any] = [()] * dist.get_world_size()
        if held.item():
            dist.all_gather_object(everyone, value)
        return everyone

    def gather_rows(self, rows: Tensor) -> tuple[Tensor, int]:
        """(The rows of the processes that run different samples, in order, of which each may have another number; the
        place of this process's first row.) Gradients flow to all of them, so that a mean over all rows has the
        gradients that it has in one process. A collective."""
        if self.mesh is None or self.size == 1:
            return rows, 0
        group = self.mesh.get_group("data")
        counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device), group=group)
        sizes = [int(count) for count in counts]
        padding = [0, 0] * (rows.dim() - 1) + [0, max(sizes) - len(rows)]
        padded = nn.functional.pad(rows, padding).contiguous()
        if padded.requires_grad:
            parts = all_gather(padded, group=group)
        else:
            parts = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(parts, padded, group=group)
        kept = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(kept), sum(sizes[: self.rank])

    def together(self) -> None:
        """Wait for all processes (a barrier)."""
        if self.mesh is not None:
            dist.barrier()


def join_world(settings: Parallel) -> World:
    """Join the process group started by torchrun, or return a world of one. Raises RecipeError if the processes cannot
    be arranged as the recipe specifies.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count % settings.tensor:
        raise RecipeError(f"parallel.tensor: {settings.tensor} does not divide the {count} processes of this run")
    if count > 1 and settings.kind == "none":
        raise RecipeError(f"parallel.kind: none is for one process, and there are {count}: take ddp or fsdp2, or auto")
    if "RANK" not in os.environ:
        return World(0, 1, device)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun stops its processes, unless it is killed
        end_with_parent()
    if not dist.is_initialized():
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun's store outlives its workers: leave dead ones' entries
            store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    shape = (count // settings.tensor, settings.tensor)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
    return World(mesh["data"].get_local_rank(), shape[0], device, mesh)


def place(parameters: Iterable[nn.Parameter], recipe: Recipe, world: World) -> None:
    """Move parameters to this process's device: trained ones in float32, the rest in the recipe's precision."""
    for parameter in parameters:
        # Cast on the device: the stored dtype usually has fewer bytes to transfer.
        parameter.data = parameter.data.to(world.device).to(placed_dtype(parameter, recipe))


def placed_dtype(parameter: nn.Parameter, recipe: Recipe) -> torch.dtype:
    """The dtype that `place` gives a parameter."""
    return torch.float32 if parameter.requires_grad else getattr(torch, recipe.precision)


def is_sharded(recipe: Recipe, world: World) -> bool:
    """Whether each process holds only a part of every layer."""
    return world.mesh is not None and recipe.parallel.kind in ("auto", "fsdp2")


def _check_one_device(model: LlavaModel) -> None:
    if model.decoder.layer_groups:
        raise RecipeError("the model was loaded with a device_map: a training run places it itself, so load it without")


def parallelize(model: LlavaModel, recipe: Recipe, world: World) -> nn.Module:
    """The model as all processes run it. Call it before creating the optimizer, since parameters change. A model to be
    sharded may still be on the host (see `place`): its layers are moved to the device one by one. From here on all
    processes use the first rank's verdicts on ops (`ops/selection`). Raises BackendError if the GPUs differ."""
    _check_one_device(model)
    share(world.device)
    settings = recipe.parallel
    if world.mesh is None or settings.kind == "none":
        return model
    model.runs_every_part = True
    if is_sharded(recipe, world):
        _shard(model, recipe, world)
        return model
    ids = [world.device] if world.device.type == "cuda" else None
    group = world.mesh.get_group("data")
    return DistributedDataParallel(model, ids, process_group=group, forward_sync_buffers=False)


def _shard(model: LlavaModel, recipe: Recipe, world: World) -> None:
    """Apply tensor parallelism, then FSDP2. Units are each decoder layer, the tower, and the root with the rest
    (embedding, head, projector). A frozen tower is small, so it is replicated on every process and never gathered."""
    assert world.mesh is not None
    mesh, tensor = world.mesh["data"], world.mesh["tensor"]
    policy = MixedPrecisionPolicy(getattr(torch, recipe.precision), torch.float32, cast_forward_inputs=False)

    def to_device(unit: nn.Module) -> None:
        left = [each for each in unit.parameters() if not isinstance(each, DTensor) and each not in replicated]
        place(left, recipe, world)
        for parameter in left:  # a unit must have one dtype; float32 shards are small
            parameter.data = parameter.data.float()

    if tensor.size() > 1:
        _check_heads(model, tensor)
    tower = model.vision_tower
    replicated: set[nn.Parameter] = set()
    if any(parameter.requires_grad for parameter in tower.parameters()):
        to_device(tower)
        fully_shard(tower, mesh=mesh, mp_policy=policy)
    else:
        replicated = set(tower.parameters())
        place(replicated, recipe, world)
    plan = model.config.decoder.tensor_plan
    for layer in model.decoder.layers:
        to_device(layer)
        if tensor.size() > 1:
            parallelize_module(layer, tensor, {name: _STYLES[split]() for name, split in plan.items()})
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    to_device(model)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=replicated)


def _check_heads(model: LlavaModel, mesh: DeviceMesh) -> None:
    """Raise RecipeError unless a layer's heads divide evenly over the tensor mesh."""
    config = model.config.decoder
    if not config.tensor_plan:
        raise RecipeError(f"parallel.tensor: a decoder of type {config.family} is not split; set it to 1")
    for what, number in (("query", config.num_heads), ("key", config.num_kv_heads)):
        if number % mesh.size():
            raise RecipeError(f"parallel.tensor: {mesh.size()} does not divide the decoder's {number} {what} heads")


def clip_gradients(parameters: Iterable[nn.Parameter], most: float | None) -> float:
    """Scale gradients to a norm of at most `most` (None: no limit); return the norm before. Parameters may be on
    different meshes."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    by_mesh = defaultdict(list)
    for grad in grads:
        by_mesh[grad.device_mesh if isinstance(grad, DTensor) else None].append(grad)
    norms = [torch.nn.utils.get_total_norm(group) for group in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = math.hypot(*(float(each) for each in whole)) if whole else 0.0
    if most is not None and norm > most:
        torch._foreach_mul_(grads, most / (norm + 1e-6))
    return norm
