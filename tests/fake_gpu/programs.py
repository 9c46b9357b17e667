"""Programs on a GPU of fake tensors (device.py): each a function that raises if it goes wrong.

    python -m tests.fake_gpu.programs

runs them all and prints, as JSON, what each raised, or null. test_fake_gpu.py is the test.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from tests.fake_gpu.device import IMPLEMENTATIONS, Reads, fake_gpu, load

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        load(Path(folder))

import numpy as np
import torch
from torch import nn

import llava_fast
from llava_fast.generation.device_sampling import DeviceSteps
from llava_fast.generation.llava import Llava
from llava_fast.generation.prompt import read_prompt
from llava_fast.generation.runner import Runner
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import new_sequence
from llava_fast.inputs.plan.buckets import bucket_of
from llava_fast.inputs.plan.plan import TextPiece
from llava_fast.integrations.collator import Collator
from llava_fast.models import eight_bit
from llava_fast.models.batch import Batch
from llava_fast.models.decode_graphs import DecodeGraphs
from llava_fast.models.decoders.llama import LlamaConfig
from llava_fast.models.decoders.stack import Decoder
from llava_fast.models.encode_graphs import filled_batch
from llava_fast.models.fused import merge_linears
from llava_fast.models.paged_cache import BlockTable, Pages
from llava_fast.models.quantised import put
from llava_fast.models.recompute import set_recompute
from llava_fast.ops import QuantisedWeight, rms_norm, use_backend
from llava_fast.ops.selection import tables
from llava_fast.ops.selection.store import Table
from llava_fast.ops.selection.verdict import Verdict
from llava_fast.train.objective import forward
from llava_fast.train.objectives.reference import answer_log_probs
from llava_fast.train.optim import build_optimizer, freeze
from llava_fast.train.parallel import clip_gradients
from llava_fast.train.recipe import parse_recipe
from tests.support import tiny

BACKENDS = ("auto", "triton")
MODELS = ("llava15", "next", "next_qwen", "next_mistral_window", "video", "video_max_odd", "onevision")


def talk(question: str, **visual) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "the end"}], **visual}


def requests(name: str) -> list[dict]:
    """One with images or a video, one with a single image, one of text alone."""
    film = {"video": [tiny.picture(30, 40)] * 4}
    first = talk("<video>\nhello", **film) if "video" in name else talk("<image> or <image>?", images=PICTURES)
    return [first, talk("<image>\nhello", images=PICTURES[:1]), talk("hello")]


RECIPE = {
    "model": "none",
    "output": "none",
    "trainable": ["projector", "decoder"],
    "data": {"sources": [{"path": "none"}]},
    "optimizer": {"learning_rate": 1e-3},
    "batch_size": 8,
}
PICTURES = [tiny.picture(90, 130), tiny.picture(40, 30)]


def on_gpu(name: str, **changes) -> Llava:
    """The tiny model of that name, on the GPU; its processor with changes."""
    ours = tiny.pair(name).ours
    with torch.device("cuda"):
        return Llava(ours.config, replace(ours.processor, **changes))


def all_on_gpu(model: nn.Module) -> None:
    """Every parameter and every gradient is, and gradients there are."""
    found = [part for each in model.parameters() for part in (each, each.grad) if part is not None]
    assert {each.device.type for each in found} == {"cuda"}
    assert len(found) > len(list(model.parameters()))


def encoding(name: str, backend: str, **changes) -> None:
    """From pixels to the decoder's inputs nothing is read back."""
    with fake_gpu() as reads, use_backend(backend), torch.no_grad():
        model = on_gpu(name, **changes)
        inputs = model.inputs_embeds(model.prepare(requests(name)))
    assert inputs.device.type == "cuda", reads
    assert not reads, reads


def filling(name: str, backend: str) -> None:
    """Nor in a batch that was filled up to a graph's bucket."""
    with fake_gpu() as reads, use_backend(backend), torch.no_grad():
        model = on_gpu(name)
        batch = model.prepare(requests(name))
        filled = filled_batch(batch, replace(bucket_of(batch.plan), tiles=len(batch.tiles) + 1))
        inputs = model.inputs_embeds(filled)
    assert len(inputs) == filled.plan.rows, reads
    assert inputs.device.type == "cuda", reads
    assert not reads, reads


def encoding_launches(bound: int) -> None:
    """Five tiles of a CLIP of 24 layers, up to the second last: what a graph replays (its kernels do not depend on
    widths), with the Triton ops and merged Linears."""
    ours = tiny.pair("next").ours
    vision = replace(ours.config.vision, num_layers=24, feature_layers=(-2,))
    with fake_gpu() as reads, use_backend("triton"), torch.no_grad():
        with torch.device("cuda"), of_dtype(torch.bfloat16):
            model = merge_linears(Llava(replace(ours.config, vision=vision), ours.processor))
        batch = model.prepare([{"prompt": "<image>", "images": [np.zeros((2000, 2000, 3), np.uint8)]}])
        filled = filled_batch(batch, bucket_of(batch.plan))
        reads.launches = 0
        model.inputs_embeds(filled)
    assert len(filled.tiles) == 5, filled.tiles.shape
    assert not reads, reads
    assert 23 * 7 <= reads.launches <= bound, reads.launches


def training(name: str, backend: str, layout: str, logits: str) -> None:
    """Nor in both passes of a training step, with everything trained."""
    with fake_gpu() as reads, use_backend(backend):
        model = on_gpu(name)
        model(model.prepare(requests(name), labels=True, layout=layout), logits=logits).loss.backward()
        all_on_gpu(model)
    assert not reads, reads


def preferring(backend: str) -> None:
    """Nor with two answers after one prompt (preference tuning)."""
    with fake_gpu() as reads, use_backend(backend):
        model, tiles = on_gpu("next"), []
        outline = model.processor.outline({"prompt": "<image> hello", "images": PICTURES[:1]})
        answers = [TextPiece(np.full(rows, 9, np.int64), np.ones(rows, bool)) for rows in (5, 3)]
        sequence = [*model.processor.pieces(outline, tiles), *answers]
        batch = Batch.from_prepared(model.processor.assemble([sequence], tiles, branches=[(5, 3)]), "cuda")
        losses, _ = forward(model, batch, "bfloat16")
        answer_log_probs(losses, batch.plan)[0].sum().backward()
        all_on_gpu(model)
    assert not reads, reads


def idling(backend: str) -> None:
    """Nor where a process of a sharded run has no sample in a step."""
    with fake_gpu() as reads, use_backend(backend):
        model = on_gpu("next")
        model.runs_every_part = True
        model(model.prepare([], labels=True), logits="none").loss.backward()
        all_on_gpu(model)
    assert not reads, reads


def generating(name: str, **options) -> None:
    """A step of decoding moves its tokens (a fake list reads them one by one), or the logits to draw from, once."""
    with fake_gpu() as reads:
        made = on_gpu(name).generate(requests(name), max_new_tokens=4, ignore_eos=True, **options)
    assert [len(each.token_ids) for each in made] == [4, 4, 4]
    assert len(reads) == (4 if options else 4 * 3), reads


@contextlib.contextmanager
def of_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def attending(training: bool) -> None:
    """How many kernels a pass launches does not depend on how many sequences it has."""
    counts = []
    for several in (2, 7):
        with fake_gpu() as reads, use_backend("triton"), torch.inference_mode(not training):
            with torch.device("cuda"), of_dtype(torch.bfloat16):
                model = on_gpu("next_qwen")
            asked = [talk("hello") for _ in range(several)]
            if training:
                batch = model.prepare(asked, labels=True)
                reads.launches = 0
                model(batch, logits="none").loss.backward()
            else:
                runner = Runner(model)
                made = [
                    new_sequence(model, read_prompt(model.processor, each), llava_fast.Sampling()) for each in asked
                ]
                for sequence in made:
                    sequence.table = BlockTable(runner.cache)
                    sequence.table.reserve(sequence.rows)
                reads.launches = 0
                runner.prefill([(sequence, sequence.rows) for sequence in made])
        assert not reads, reads
        counts.append(reads.launches)
    assert counts[0] == counts[1], counts


def prefilling(most_whole: int, most_chunked: int, precision: str | None = None) -> None:
    """A pass over two prompts with images in a decoder of 32 layers launches at most so many kernels, and each pass of
    chunks. (Kernels do not depend on widths.) `encoding_launches` counts the images' own. With the Triton ops; with a
    precision, which those have not, on the references."""
    ours = tiny.pair("next").ours
    config = replace(ours.config, decoder=replace(ours.config.decoder, num_layers=32))
    passes = {}
    for chunk in (None, 16):
        with fake_gpu() as reads, use_backend("auto" if precision else "triton"), torch.inference_mode():
            with torch.device("cuda"), of_dtype(torch.bfloat16):
                model = merge_linears(Llava(config, ours.processor)).eval()
            if precision is not None:
                eight_bit.FEW_ROWS = 8
                eight_bit.use_precision(model, precision)
            runner = Runner(model)
            prompt = read_prompt(model.processor, talk("<image>\nhello", images=PICTURES[:1]))
            both = [new_sequence(model, prompt, llava_fast.Sampling()) for _ in range(2)]
            for sequence in both:
                sequence.table = BlockTable(runner.cache)
                sequence.table.reserve(sequence.rows)
            runner._embed, counts = functools.partial(_uncounted, reads, runner._embed), []
            while (left := prompt.rows - both[0].cached.length) > 0:
                chunks = [(sequence, min(chunk or left, left)) for sequence in both]
                reads.launches = 0
                runner.prefill(chunks)
                runner.advance(chunks)
                counts.append(reads.launches)
            assert not reads, reads
        passes[chunk] = counts
    (whole,), chunked = passes.values()
    assert len(chunked) > 2, chunked
    assert 32 * 10 <= whole <= most_whole, passes
    assert max(chunked) <= most_chunked, passes


def _uncounted(reads: Reads, run: Callable, *args):
    before = reads.launches
    out = run(*args)
    reads.launches = before
    return out


def spreading(on_first: int) -> None:
    """A model on two GPUs, with so many layers on the first, answers: no operation mixes tensors of both."""
    first, second = (torch.device("cuda", number) for number in range(2))
    with fake_gpu() as reads:
        model = on_gpu("next")
        with torch.device(second):
            others = Llava(model.config, model.processor).decoder.layers[on_first:]
        model.decoder.layers = nn.ModuleList([*model.decoder.layers[:on_first], *others])
        model.decoder.layer_groups = ((first, 0), (second, on_first)) if on_first else ((second, 0),)
        made = model.generate(requests("next"), max_new_tokens=4, ignore_eos=True)
        with torch.no_grad():
            model(model.prepare(requests("next"), labels=True), logits="none")
    assert [len(each.token_ids) for each in made] == [4, 4, 4]
    assert len(reads) == 4 * 3, reads


def stepping(heads: int, kv_heads: int, bound: int) -> None:
    """A decoding step of a 7B from device tensors alone reads nothing back, and launches at most ten kernels a layer
    (and few besides), with the Triton ops and merged Linears."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        rms_norm_eps=1e-5,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        max_positions=4096,
    )
    with fake_gpu() as reads, use_backend("triton"), torch.no_grad():
        with torch.device("cuda"), of_dtype(torch.bfloat16):
            decoder = merge_linears(Decoder(config))
            cache = decoder.new_cache(max_bytes=1 << 30)
            cache.allocate(4)
            decoder.rope.reserve(128, cache.device, cache.dtype)
            numbers = torch.zeros(4, 6, dtype=torch.int32)
        addresses = torch.zeros(8, 2, dtype=torch.int64, device="cuda")
        pages = Pages(addresses, numbers[:, 2:].contiguous(), numbers[:, 0].contiguous())
        reads.launches = 0
        logits = decoder.step(numbers[:, 1].contiguous(), pages, cache)
    assert tuple(logits.shape) == (4, 32000)
    assert not reads, reads
    assert 10 * 32 <= reads.launches <= bound, reads.launches


def quantised_on_gpu(module: nn.Module, scheme: str, group: int | None) -> nn.Module:
    """The module with weights in 8 or 4 bits in place of its decoder's Linears."""
    for name, linear in list(module.named_modules()):
        if type(linear) is nn.Linear and ("layers." in name or "lm_head" in name) and "tower" not in name:
            out, columns = linear.weight.shape
            stored, dtype = (columns, torch.int8) if scheme == "int8" else (columns // 2, torch.uint8)
            with torch.device("cuda"):
                codes = torch.empty(out, stored, dtype=dtype)
                scale = torch.empty(out, columns // group if group else 1)
            put(module, name, QuantisedWeight.unchecked(codes, scale), linear.weight.dtype)
    return module


def quantised_stepping(scheme: str, rows: int, bound: int) -> None:
    """A decoding step of two layers of a 7B with quantised weights: every product reads the codes, none dequantises a
    weight, nothing is read back. Of many rows each weight is dequantised once, and once more for gradients."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=2,
        rms_norm_eps=1e-5,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_positions=4096,
    )
    weights = 2 * 7 + 1
    group = 128 if scheme == "int4" else None
    with fake_gpu() as reads, use_backend("triton"):
        with torch.device("cuda"), of_dtype(torch.bfloat16):
            decoder = quantised_on_gpu(Decoder(config), scheme, group)
            cache = decoder.new_cache(max_bytes=1 << 30)
            cache.allocate(4)
            decoder.rope.reserve(128, cache.device, cache.dtype)
            numbers = torch.zeros(rows, 6, dtype=torch.int32)
            many = torch.zeros(100, config.hidden_size, requires_grad=True)
        addresses = torch.zeros(8, 2, dtype=torch.int64, device="cuda")
        pages = Pages(addresses, numbers[:, 2:].contiguous(), numbers[:, 0].contiguous())
        reads.launches = 0
        with torch.no_grad():
            decoder.step(numbers[:, 1].contiguous(), pages, cache)
        step, launches = reads.kernels[:], reads.launches
        reads.kernels.clear()
        mlp = decoder.layers[0].mlp
        mlp(many).sum().backward()
    own = "quantised_row_kernel" if rows == 1 else "quantised_rows_kernel"
    assert step.count(own) == weights, step
    assert set(step) <= {own, "sum_shares_kernel"}, step
    assert reads.kernels == ["dequantise_kernel"] * 6, reads.kernels
    assert launches <= bound, launches
    assert not reads, reads


def quantised_by_verdict(is_used: bool) -> None:
    """Without a requested backend the kernels run if a verdict says so, and else the reference."""
    settings = tables.settings()
    before = settings.pinned
    settings.pinned = Table(verdicts={"quantised_linear": Verdict(backend="triton")} if is_used else {})
    try:
        with fake_gpu() as reads:
            linear = quantised_on_gpu(nn.ModuleDict({"lm_head": nn.Linear(64, 32, device="cuda")}), "int4", 32)[
                "lm_head"
            ]
            for rows in (1, 40):
                linear(torch.zeros(rows, 64, device="cuda"))
    finally:
        settings.pinned = before
    assert reads.kernels == ["quantised_row_kernel", "dequantise_kernel"] * is_used, reads.kernels
    assert not reads, reads


class Counted(DecodeGraphs):
    """Graphs whose launch counts as one kernel; what the device chooses is 1."""

    kernels = 0  # of the last one

    def __init__(self, *args, reads: Reads) -> None:
        super().__init__(*args)
        self.reads = reads

    def capture(self, step):
        before = self.reads.launches
        out = step()
        self.kernels = self.reads.launches - before

        def replay():
            self.reads.launches += 1

        return replay, out


def choosing(kernels: int, scheme: str | None = None, **options) -> None:
    """A decoding step whose tokens the device chooses: one copy to it, one launch, one copy back, and no wait. In the
    graph the choice costs so many kernels beside those of a step that ends with logits. With a scheme, of a decoder
    whose weights are quantised."""
    with fake_gpu() as reads, use_backend("triton"), torch.inference_mode():
        model = on_gpu("next")
        if scheme is not None:
            quantised_on_gpu(model, scheme, 32)
        cache = model.decoder.new_cache()
        graphs = Counted(model.decoder, cache, reads=reads)
        scheduler = Scheduler(Runner(model, cache, device=DeviceSteps(graphs)))
        sampling = llava_fast.Sampling(max_new_tokens=20, ignore_eos=True, **options)
        for request in requests("next"):
            scheduler.add(new_sequence(model, read_prompt(model.processor, request), sampling, 1))
        for _ in range(4):
            scheduler.step()  # prompts, the bucket's first step, the capture
        reads.clear()
        reads.launches = 0
        moved = scheduler.step()
        assert len(moved) == 3
        assert reads.launches == 3, reads.launches
        assert not reads, reads
        assert graphs.graphs.keys
        assert (graphs.unfit, graphs.failed) == (None, {})
        chosen = graphs.kernels
        token = torch.ones(4, dtype=torch.int32, device="cuda")
        graphs.capture(lambda: model.decoder.step(token, some_pages(cache), cache))
    assert chosen - graphs.kernels <= kernels, chosen - graphs.kernels


def some_pages(cache) -> Pages:
    numbers = torch.zeros(4, 33, dtype=torch.int32, device="cuda")
    return Pages(cache.addresses, numbers[:, 1:].contiguous(), numbers[:, 0].contiguous())


def optimizing(precision: str, recompute: str, backend: str) -> None:
    """A step of a recipe's optimizer: of it all the gradients' norm is read."""
    recipe = parse_recipe(RECIPE)
    with fake_gpu() as reads, use_backend(backend):
        model = on_gpu("next")
        freeze(model, recipe)
        set_recompute(model, recompute)
        optimizer = build_optimizer(model, recipe.optimizer)
        losses, _ = forward(model, model.prepare(requests("next"), labels=True), precision)
        losses.sum().backward()
        all_on_gpu(model)
        clip_gradients([each for each in model.parameters() if each.requires_grad], 1.0)
        optimizer.step()
    assert reads == ["item"], reads


def accelerated(name: str, backend: str) -> None:
    """transformers' model, accelerated and with a collator's plan: nothing is read back in either pass."""
    case = tiny.CASES[name]
    samples = [{"messages": each["messages"], "images": each.get("images", [])} for each in requests("next")]
    given = Collator(tiny.hf_processor(case), tiny.hf_config(case), chat_template="vicuna_v1")(samples)
    with fake_gpu() as reads, use_backend(backend):
        with torch.device("cuda"):
            model = llava_fast.accelerate(tiny.hf_model(case).train(), training_logits=False)
        model(**{name: value.to("cuda") for name, value in given.items()}).loss.backward()
        all_on_gpu(model)
    assert not reads, reads


def mixing() -> None:
    """Goes wrong: a program that leaves a tensor behind."""
    with fake_gpu():
        torch.ones(2, device="cuda") + torch.ones(2)


def reading() -> None:
    """Goes wrong: a program that asks the device."""
    with fake_gpu() as reads:
        torch.ones(2, device="cuda").sum().item()
    assert not reads, reads


def reading_inside() -> None:
    """Goes wrong: an op that asks the device."""
    given = torch.ones(4, 8), torch.ones(8)
    stays = IMPLEMENTATIONS["rms_norm"]
    IMPLEMENTATIONS["rms_norm"] = lambda x, *rest: stays(x.cpu().to("cuda"), *rest)
    with fake_gpu() as reads:
        rms_norm(*(each.to("cuda") for each in given), 1e-5)
    IMPLEMENTATIONS["rms_norm"] = stays
    assert not reads, reads


def main() -> None:
    """Run every program."""
    programs: dict[str, Callable[[], None]] = {}

    def add(function: Callable[..., None], *args, **options) -> None:
        programs[" ".join((function.__name__, *map(str, args), *options))] = functools.partial(
            function, *args, **options
        )

    for name in MODELS:
        tiny.pair(name)  # made of real tensors
        add(generating, name)
        add(training, name, "auto", "padded", "supervised")
    for backend in BACKENDS:
        for name in MODELS:
            add(encoding, name, backend)
            add(training, name, backend, "packed", "none")
        for name in ("llava15", "next", "next_qwen"):
            add(accelerated, name, backend)
        add(encoding, "next", backend, tiles_on="device")
        add(filling, "next", backend)
        add(optimizing, "bfloat16", "selective", backend)
        add(preferring, backend)
        add(idling, backend)
    add(generating, "next", temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.1, seed=3)
    add(training, "next", "auto", "packed", "all")
    add(optimizing, "bfloat16", "layers", "auto")
    add(optimizing, "float32", "none", "auto")
    add(encoding_launches, 190)
    add(prefilling, 498, 659)
    add(prefilling, 1779, 1938, "int8")
    add(prefilling, 1395, 1554, "fp8")
    for on_first in (1, 0):
        add(spreading, on_first)
    add(attending, True)
    add(attending, False)
    add(stepping, 32, 32, 328)
    add(stepping, 32, 8, 328)
    add(choosing, 10)
    add(choosing, 10, scheme="int4")
    for scheme, rows, bound in (("int4", 1, 32), ("int8", 1, 32), ("int4", 4, 47)):
        add(quantised_stepping, scheme, rows, bound)
    for is_used in (True, False):
        add(quantised_by_verdict, is_used)
    add(choosing, 26, temperature=1.0, min_p=0.1)
    add(choosing, 50, temperature=1.0, top_p=0.9, top_k=5, repetition_penalty=1.2)
    add(mixing)
    add(reading)
    add(reading_inside)
    results: dict[str, str | None] = {}
    for name, run in programs.items():
        try:
            run()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
