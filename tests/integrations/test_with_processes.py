"""Two processes (gloo), DDP and FSDP2 around an accelerated model, in either order, against the stock model wrapped in
the same way: each process's loss, and the gradients they share.

One pair of processes goes through all cases and leaves its results in files; each test reads its own.
"""

import datetime
import logging
import os
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import llava_fast
from tests.support.against_stock import assert_same_gradients, batch, shallow
from tests.support.parity import assert_close

SECONDS = 200  # for all cases, once both have come; a hang ends here
BATCHES = {
    "images everywhere": ("a two", "tall none"),
    "text in one process": ("two a", "none"),
    "text everywhere": ("none", "none none"),
}
WRAPS = ["DDP", "FSDP2 of layers", "FSDP2 of tower layers too", "FSDP2 of the tower as one", "FSDP2 of other parts too"]
ORDERS = ["stock", "accelerate first", "accelerate last"]
TEXT_ALONE = ("DDP", "FSDP2 of tower layers too", "FSDP2 of the tower as one")
CASES = [(wrap, which) for wrap in WRAPS for which in BATCHES if which != "text everywhere" or wrap in TEXT_ALONE]


def stock_runs(how: str, which: str) -> bool:
    """A stock model under FSDP2 hangs, or its gradients do not fit each other, where one process has no image; with the
    tower sharded as one it fails."""
    return how == "DDP" or (which == "images everywhere" and how != "FSDP2 of the tower as one")


def wrapped(how: str, model: nn.Module) -> nn.Module:
    if how == "DDP":  # the tower's last layer has no gradient in the stock model either
        return DistributedDataParallel(model, find_unused_parameters=True)
    inner = model.model
    parts = list(inner.language_model.layers)
    if how == "FSDP2 of the tower as one":
        parts.append(inner.vision_tower)
    elif how != "FSDP2 of layers":
        parts += inner.vision_tower.encoder.layers
    if how == "FSDP2 of other parts too":
        parts += [inner.multi_modal_projector, inner.get_input_embeddings(), model.lm_head]
    mesh = init_device_mesh("cpu", (2,))
    for part in parts:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(how: str, order: str, inputs: dict) -> dict:
    """One step's loss, logits and gradients (whole ones), an evaluation's loss, and what took the stock path."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("llava_fast.integrations").addHandler(handler)
    model = shallow("next").train()
    if order == "accelerate first":
        llava_fast.accelerate(model)
    model = wrapped(how, model)
    if order == "accelerate last":
        llava_fast.accelerate(model)
    out = model(**inputs)
    out.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        gradients[name.removeprefix("module.")] = gradient
    with torch.no_grad():
        evaluated = model.eval()(**inputs).loss
    logging.getLogger("llava_fast.integrations").removeHandler(handler)
    made = {"loss": out.loss.detach(), "logits": out.logits.detach(), "evaluated": evaluated}
    return made | {"gradients": gradients, "said": said}


def process(rank: int, folder: str) -> None:
    """What each process does: all cases, one after the other."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    batches = torch.load(f"{folder}/batches")
    Path(folder, f"ready-{rank}").touch()
    for number, (how, which) in enumerate(CASES):
        inputs = batches[which][rank]
        orders = ORDERS if stock_runs(how, which) else ORDERS[1:]
        torch.save({order: step(how, order, inputs) for order in orders}, f"{folder}/{number}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("processes")
    batches = {which: [batch("next", each, labels=True) for each in names] for which, names in BATCHES.items()}
    torch.save(batches, folder / "batches")
    context = multiprocessing.spawn(process, (str(folder),), nprocs=2, join=False)
    try:
        while not context.join(timeout=1) and len(list(folder.glob("ready-*"))) < 2:
            pass  # importing takes what it takes
        end = datetime.datetime.now() + datetime.timedelta(seconds=SECONDS)
        while not context.join(timeout=1):
            assert datetime.datetime.now() < end, f"it hangs after {sorted(file.name for file in folder.iterdir())}"
    finally:
        for each in context.processes:
            each.kill()
    return {case: [torch.load(folder / f"{number}-{rank}.pt") for rank in (0, 1)] for number, case in enumerate(CASES)}


def test_one_process_waits_for_no_other(tmp_path):
    """So a batch without an image gives tower and projector no gradient, as in the stock model."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        model = llava_fast.accelerate(shallow("next"))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model(**batch("next", "none", labels=True)).loss.backward()
        assert model.model.multi_modal_projector.linear_1.weight.grad is None
        assert model.lm_head.weight.grad is not None
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize(("how", "which"), CASES)
def test_loss_and_gradients(how, which, order, results):
    like = how if stock_runs(how, which) else "DDP"  # which means the same gradients as FSDP2 does
    for ours, stock in zip(results[how, which], results[like, which], strict=True):
        found, expected = ours[order], stock["stock"]
        for what in ("loss", "logits"):
            assert_close(f"accelerated {what}, two processes", found[what], expected[what], 1e-5)
        assert_same_gradients("accelerated gradients, two processes", found["gradients"], expected["gradients"])
        assert_close("evaluated, two processes", found["evaluated"], expected["evaluated"], 1e-5)
        of_images = [found["gradients"][name] for name in found["gradients"] if "tower" in name or "projector" in name]
        made = [gradient for gradient in of_images if gradient is not None]
        assert any(gradient.any() for gradient in made) == (which != "text everywhere")
        if which == "text everywhere":  # as with the dummy image of the original trainers: zero, not None
            assert bool(made) == (how != "DDP")
        assert ["output head" in line for line in found["said"]] == ([True] if "other parts" in how else [])
