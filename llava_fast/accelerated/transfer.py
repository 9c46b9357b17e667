"""Copies the integers of a call from the device, and the columns of its plan to the device, in one copy each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llava_fast.inputs.plan.columns import pack_columns
from llava_fast.inputs.plan.from_ids import Integers


def read_integers(ids: Tensor | None, sizes, labels: Tensor | None = None, counts=None) -> Integers:
    """The integers of a batch on the host: one copy, one synchronisation, if they are on a device."""
    given = [None if part is None else torch.as_tensor(part) for part in (ids, sizes, labels, counts)]
    away = next((part.device for part in given if part is not None and part.device.type != "cpu"), None)
    if away is not None:
        flat = torch.cat([part.to(away).reshape(-1).long() for part in given if part is not None]).cpu()
        pieces = iter(flat.split([part.numel() for part in given if part is not None]))
        given = [None if part is None else next(pieces).view(part.shape) for part in given]
    return Integers(*(None if part is None else part.detach().long().numpy() for part in given))


def to_device(columns: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Columns as int32 tensors on a device, in one copy without synchronisation."""
    flat, sections = pack_columns(columns)
    moved = torch.from_numpy(flat)
    if device.type == "cuda":
        moved = moved.pin_memory().to(device, non_blocking=True)
    return {name: moved[start : start + int(np.prod(shape))].view(shape) for name, (start, shape) in sections.items()}
