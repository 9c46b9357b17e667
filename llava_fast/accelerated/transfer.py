"""Copies the integers of a call from the device, in one copy."""

from __future__ import annotations

import torch
from torch import Tensor

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
