"""Freezing, parameter groups, AdamW and its learning-rate schedule."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer as TorchOptimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from llava_fast.errors import RecipeError
from llava_fast.models.vlm import LlavaModel
from llava_fast.train.parts import PARTS, is_factor, part_of

if TYPE_CHECKING:
    from llava_fast.train.recipe import Optimizer, Recipe


def freeze(model: LlavaModel, recipe: Recipe) -> list[str]:
    """Make only the parts named in the recipe require gradients; return the names of their parameters. Tower layers
    after the selected one stay frozen, since they never run, and so does what the connector does not use. Raises
    RecipeError for a name that matches nothing.
    """
    trained = set()
    names = [name for name, _ in model.named_parameters()]
    for pattern in recipe.trainable:
        found = {name for name in names if part_of(name) == pattern or fnmatchcase(name, pattern)}
        if not found:
            raise RecipeError(f"trainable: {pattern!r} is neither a part ({', '.join(PARTS)}) nor a parameter's name")
        trained |= found
    never_run = {id(parameter) for module in model.vision_tower.unused() for parameter in module.parameters()}
    never_run |= {id(parameter) for parameter in model.projector.unused()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_((name in trained and id(parameter) not in never_run) or is_factor(name))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def build_optimizer(model: nn.Module, settings: Optimizer) -> TorchOptimizer:
    """AdamW for the parameters that require gradients, in groups by part and by weight decay."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), parameter.dim() > 1), []).append(parameter)
    rates: dict[str, float] = {str(part): rate for part, rate in settings.rates.items()}
    each = [
        {
            "params": parameters,
            "lr": rates.get(part, settings.learning_rate),
            "weight_decay": settings.weight_decay if decays else 0.0,
            "name": f"{part} {'matrices' if decays else 'vectors'}",
        }
        for (part, decays), parameters in groups.items()
    ]
    rate, betas, eps = settings.learning_rate, settings.betas, settings.eps
    if settings.states == "8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise RecipeError("optimizer.states: 8bit needs torchao: pip install torchao") from None
        return AdamW8bit(each, lr=rate, betas=betas, eps=eps)
    return torch.optim.AdamW(each, lr=rate, betas=betas, eps=eps, fused=True)


def build_schedule(optimizer: TorchOptimizer, settings: Optimizer, total: int) -> LRScheduler:
    """The learning-rate schedule over `total` steps, from transformers (warm-up rounded up, as in its Trainer).
    `first_rate` and `last_rate` are those of a part with `learning_rate`; another part's are in proportion."""
    from transformers import get_scheduler

    warmup = math.ceil(total * settings.warmup)
    made = get_scheduler(settings.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    first, last = (rate / settings.learning_rate for rate in (settings.first_rate, settings.last_rate))
    if not first and not last:
        return made
    assert isinstance(made, LambdaLR)
    shares = list(made.lr_lambdas)

    def lifted(share: Callable[[int], float], step: int) -> float:
        least = first if step < warmup else last
        return least + (1 - least) * share(step)

    return LambdaLR(optimizer, [functools.partial(lifted, share) for share in shares])
