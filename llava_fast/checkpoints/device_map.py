"""Laying a model out over the devices of one machine: everything but the decoder's layers on the first, the layers in
order over all, in proportion to the memory that is free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava_fast.errors import CheckpointError
from llava_fast.models.config import ConfiguredModel
from llava_fast.models.decoders.base import LayerGroup
from llava_fast.models.decoders.stack import Decoder
from llava_fast.models.paged_cache import free_memory

USED = 0.8  # of the free memory that weights may take, so that cache and activations have room
LAYERS = "decoder.layers."


@dataclass(frozen=True)
class DeviceMap:
    """Where each parameter goes. `groups`: the first layers of each device that has some, in order."""

    first: torch.device
    groups: tuple[LayerGroup, ...]

    def device_of(self, name: str) -> torch.device:
        """The device of the parameter with this name in the model."""
        if not name.startswith(LAYERS):
            return self.first
        layer = int(name.removeprefix(LAYERS).partition(".")[0])
        return [device for device, first in self.groups if first <= layer][-1]

    def apply(self, model: ConfiguredModel) -> None:
        """Tell the decoder where its layers are."""
        if len(self.groups) > 1 or self.groups[0][0] != self.first:
            decoder: Any = model.decoder
            decoder.layer_groups = self.groups


def plan_devices(
    model: ConfiguredModel,
    devices: Sequence[torch.device],
    sizes: Mapping[str, int],
    free: Callable[[torch.device], int] = free_memory,
) -> DeviceMap:
    """The fewest of these devices, in their order, whose free memory holds the model's weights, with a fifth to spare,
    and how its layers spread over them: some on the first device if one fits there. `sizes`: parameter name -> bytes
    once it is loaded (`load.loaded_sizes`). Raises CheckpointError if all devices are too small, or for a decoder of
    transformers, whose layers stay together."""
    decoder: Any = model.decoder
    layers = [0] * len(decoder.layers)
    for name, size in sizes.items():
        if name.startswith(LAYERS):
            layers[int(name.removeprefix(LAYERS).partition(".")[0])] += size
    total, room = sum(sizes.values()), [int(USED * free(device)) for device in devices]
    others = total - sum(layers)
    count = next((n for n in range(1, len(room) + 1) if sum(room[:n]) >= total and room[0] >= others), None)
    if count is None:
        raise CheckpointError(
            f"device_map: the weights take {total / 1e9:.1f} GB and {len(devices)} devices have "
            f"{sum(room) / 1e9:.1f} GB for them (the first must hold {others / 1e9:.1f} GB that is no layer): use a "
            "smaller dtype, quantize, or more devices"
        )
    if count > 1 and not isinstance(decoder, Decoder):
        raise CheckpointError(
            f"device_map: the decoder {decoder.config.family!r} is transformers' own and is not spread over "
            "devices: load it on one"
        )
    groups: list[LayerGroup] = []
    share, number = total / sum(room[:count]), 0
    held, end = 0, float(-others)  # bytes of layers on the devices so far, and how many there should be
    for place, device in enumerate(devices[:count]):
        end += room[place] * share
        if place == 0 and room[0] >= others + layers[0]:  # a large rest of the model would leave it none
            end = max(end, layers[0] / 2)
        first = number
        while number < len(layers) and (place == count - 1 or held + layers[number] / 2 <= end):
            held += layers[number]
            number += 1
        if number > first:
            groups.append((device, first))
    return DeviceMap(devices[0], tuple(groups))
