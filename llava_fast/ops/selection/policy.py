"""Runs each operator call by the verdict of its class. A missing verdict is found at once, if tests are allowed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves

from llava_fast.ops.selection import proof, samples, store, tables
from llava_fast.ops.selection.call_class import argument_names, call_class, signature, written_arguments
from llava_fast.ops.selection.decision import Decision, current, decided
from llava_fast.ops.selection.tables import InUse, Settings
from llava_fast.ops.selection.verdict import Verdict

_watched: list[Any] = []  # the handle of the hook on optimizers, once registered


def run(operator: str, implementation: Callable, args: Sequence[Any]) -> Any:
    """Run `implementation(*args)` with the verdict of this call's class, or with the candidate of the current trial.
    Only for calls without a requested backend.
    """
    outer = current()
    if outer is not None and outer.is_trial:
        return implementation(*args)
    settings = tables.settings()
    table = settings.table(args[0].device)
    verdict = None if table.is_idle else _verdict(operator, implementation, args, table, settings)
    if verdict is None and outer is None:
        return implementation(*args)
    with decided(None if verdict is None else Decision(verdict.backend, verdict.configs)):
        return implementation(*args)


def _verdict(
    operator: str, implementation: Callable, args: Sequence[Any], table: InUse, settings: Settings
) -> Verdict | None:
    key = (operator, signature(args))
    name = table.classes.get(key)
    if name is None:
        if len(table.classes) >= tables.MOST_CLASSES:  # most sizes do not recur, and a class is cheap
            table.classes.clear()
        rows, ignored = samples.ROW_ARGS.get(operator, ()), samples.IGNORED.get(operator, ())
        name = table.classes[key] = call_class(operator, args, rows, ignored)
    verdict = table.verdicts.get(name)
    if verdict is None or (settings.thorough and verdict.by != "tune"):
        if name not in table.failed and may_prove(operator, args, table, settings):
            if settings.met is not None:
                settings.met.add(name)
                return verdict
            return _prove(name, operator, implementation, args, table, settings)
    return verdict


def may_prove(operator: str, args: Sequence[Any], table: InUse, settings: Settings) -> bool:
    """Whether a call may be tested now: budget is left, the tensors are real and not empty, no graph is being captured
    or traced, and no optimizer has stepped yet, so that all later steps of a run use the same backends.
    """
    if not table.may_grow or settings.stepped or settings.spent >= settings.budget:
        return False
    if not _watched:
        _watched.append(register_optimizer_step_post_hook(_note_step))
    tensors = [each for each in tree_leaves(list(args)) if isinstance(each, Tensor)]
    if any(type(each) not in (Tensor, nn.Parameter) for each in tensors) or not args[0].numel():
        return False
    if any(each.dtype == torch.float64 for each in tensors) or not samples.is_known(operator):
        return False
    if is_recorded(args[0].device):
        return False
    if operator.endswith("_backward") or any(each.requires_grad for each in tensors):
        settings.trains = True
    return True


def is_recorded(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on this device."""
    return torch.jit.is_tracing() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _note_step(*_: Any) -> None:
    tables.settings().end_step()


def _prove(
    name: str, operator: str, implementation: Callable, args: Sequence[Any], table: InUse, settings: Settings
) -> Verdict | None:
    """Find the verdict of a class: read it if another process has found it meanwhile, else run the tests."""
    if args[0].is_cuda:  # holding the lock while the stream waits for another process could deadlock
        torch.cuda.synchronize(args[0].device)
    verdict, asked = None, time.perf_counter()
    with store.locked(table.machine, store.WAIT - settings.waited) as state:
        started = time.perf_counter()
        settings.waited += started - asked
        if state == "held":
            # Keep verdicts in use: they may come from another rank (see sharing), found on another machine.
            table.verdicts = {**store.cached(table.machine).verdicts, **table.verdicts}
            verdict = table.verdicts.get(name)
        if state != "busy" and (verdict is None or (settings.thorough and verdict.by != "tune")):
            verdict = _found(operator, implementation, args, settings.thorough)
            if verdict is not None:
                table.verdicts[name] = verdict
                if state == "held":
                    _keep(table, name, verdict)
    if verdict is None:
        table.failed.add(name)
    settings.spent += time.perf_counter() - started
    table.may_grow = settings.spent < settings.budget
    if torch.is_inference_mode_enabled() and not settings.trains:
        table.is_asked = table.may_grow  # no earlier call will be recomputed for its gradients
    settings.heard(name, verdict)
    return verdict


def _keep(table: InUse, name: str, verdict: Verdict) -> None:
    try:
        store.keep(table.machine, {name: verdict})
    except OSError as error:
        path = store.path_of(table.machine)
        warnings.warn(f"{path}: a verdict cannot be kept ({error}); set LLAVA_FAST_CACHE", stacklevel=2)


def _found(operator: str, implementation: Callable, args: Sequence[Any], thorough: bool) -> Verdict | None:
    named = dict(zip(argument_names(operator), args, strict=True))
    try:
        small = [list(each.values()) for each in samples.samples_of(operator, named)]
        allowed = samples.tolerance(operator, named)
        return proof.prove(implementation, args, small, thorough, written_arguments(operator), allowed)
    except (proof.UnprovableError, torch.OutOfMemoryError):
        return None
    except Exception as error:  # raised by the reference: a failed test must not fail the user's call
        warnings.warn(f"{operator}: no form could be proven ({type(error).__name__}: {error})", stacklevel=2)
        return None
