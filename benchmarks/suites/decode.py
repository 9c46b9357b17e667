"""Greedy decoding after a given context, by each side's own generation loop.

The cache is filled with the same random keys and values on both sides, so prefill is not measured. llava_fast's
scheduler also detokenises, transformers' loop does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import checks, llama_cpp
from benchmarks.case import Case, Provider, Settings
from benchmarks.checks import Greedy
from benchmarks.floors import decode_floor
from benchmarks.inputs import PROMPT, ROTATED, inference, photographs, text_prompt
from benchmarks.subject import Subject
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import Sequence, new_sequence
from llava_fast.inputs.plan.plan import sequence_length
from llava_fast.models.paged_cache import BlockTable


def cases(subject: Subject, settings: Settings) -> Iterator[Case]:
    context = settings.context or _rows_of_prompt(subject, settings)
    steps = settings.new_tokens
    room = subject.config.decoder.context_length - context
    if room < steps + 1:
        raise ValueError(f"--context {context} leaves room for {room} of {steps} new tokens: lower one of them")
    makers = {"llava_fast": _ours, "hf-eager": _hf_eager, "hf-compile": _hf_compile}
    yield Case(
        suite="decode",
        model=subject.label,
        real_width=subject.real_width,
        label=f"{settings.batch_size} x {steps} tokens after {context} rows",
        providers=[makers[name](subject, settings, context) for name in settings.providers],
        check=checks.same_greedy(settings.dtype),
        floor=decode_floor(
            subject.config.decoder,
            context,
            settings.batch_size,
            steps,
            subject.dtype.itemsize,
            subject.decoder_itemsize,
        ),
        items=steps * settings.batch_size,
        unit="tokens",
        weight_bytes=subject.weight_bytes,
        peers=llama_cpp.peers(subject, settings, new_tokens=steps, context=context),
    )


def _ours(subject: Subject, settings: Settings, context: int) -> Provider:
    model, count, steps = subject.as_loaded, settings.batch_size, settings.new_tokens
    runner = Runner(model)
    cache = runner.cache
    filled = [BlockTable(cache) for _ in range(count)]
    for table in filled:
        table.reserve(context)
    for layer, number, key, value in _cached(subject, count, context):
        cache.append(layer, filled[number], 0, key, value)
    options = Sampling(max_new_tokens=steps, ignore_eos=True)
    context_ids = [5] * context  # only their number matters: they are cached
    prompts = [
        [text_prompt([*context_ids, token]) for token in _first_tokens(count, number)] for number in range(ROTATED)
    ]
    tables: list[BlockTable] = []

    def prepare() -> None:
        for table in tables:
            table.release()
        tables[:] = [BlockTable(cache) for _ in range(count)]
        for table, source in zip(tables, filled, strict=True):
            table.share(source.blocks, context)

    def run(number: int) -> list[list[int]]:
        sequences = [new_sequence(model, prompt, options) for prompt in prompts[number % ROTATED]]
        scheduler = Scheduler(runner)
        for sequence, table in zip(sequences, tables, strict=True):
            sequence.table = table
            scheduler.prefilling.append(sequence)  # as if admitted with all but its last row cached
        while not scheduler.is_idle:
            scheduler.step()
        return [sequence.token_ids for sequence in sequences]

    def result(tokens: list[list[int]]) -> Greedy:
        prepare()
        sequences: list[Sequence] = []
        for prompt, mine, table in zip(prompts[0], tokens, tables, strict=True):
            sequences.append(new_sequence(model, prompt, options))
            sequences[-1].token_ids, sequences[-1].table = mine, table
        with torch.inference_mode():
            logits = runner.prefill([(sequence, 1 + steps) for sequence in sequences])
        return Greedy(tokens, next_logits=logits.clone())

    return Provider("llava_fast", inference(run), result, prepare)


def _hf_eager(subject: Subject, settings: Settings, context: int) -> Provider:
    from transformers import DynamicCache

    cache = DynamicCache(config=subject.hf.config.get_text_config())
    _fill_hf(cache, subject, settings, context)

    def prepare() -> None:
        if surplus := cache.get_seq_length() - context:
            cache.crop(-surplus)

    return _hf_provider("hf-eager", subject.hf, subject, settings, context, cache, prepare)


def _hf_compile(subject: Subject, settings: Settings, context: int) -> Provider:
    from transformers import StaticCache

    model = subject.hf_compiled
    text = model.config.get_text_config()
    cache = StaticCache(config=text, max_cache_len=context + settings.new_tokens + 1)
    _fill_hf(cache, subject, settings, context)

    def prepare() -> None:
        for layer in cache.layers:  # a static cache masks what is beyond its length
            layer.cumulative_length.fill_(context)

    return _hf_provider("hf-compile", model, subject, settings, context, cache, prepare)


def _hf_provider(
    name: str, model, subject: Subject, settings: Settings, context: int, cache, prepare: Callable[[], None]
) -> Provider:
    count, steps = settings.batch_size, settings.new_tokens
    context_ids = torch.full((count, context), 5, device=subject.device)  # only their number matters: they are cached
    prompts = [
        torch.cat([context_ids, torch.tensor(_first_tokens(count, number), device=subject.device)[:, None]], 1)
        for number in range(ROTATED)
    ]
    mask = torch.ones_like(prompts[0])

    def run(number: int, **options):
        return model.generate(
            input_ids=prompts[number % ROTATED],
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=steps,
            do_sample=False,
            **options,
        )

    def result(ids: Tensor) -> Greedy:
        prepare()
        answer = run(0, output_logits=True, return_dict_in_generate=True)
        again = answer.sequences[:, context + 1 :]
        if not torch.equal(again, ids[:, context + 1 :]):
            raise RuntimeError(f"{name} answers one prompt in two ways, so nothing can be checked against it")
        with torch.inference_mode():
            last = model.forward(input_ids=again[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        return Greedy(again.tolist(), gaps(torch.stack(answer.logits, 1)).tolist(), last.clone())

    return Provider(name, inference(run), result, prepare, compiles=name == "hf-compile")


def gaps(logits: Tensor) -> Tensor:
    """The difference of the two largest logits relative to the largest magnitude: [..., vocabulary] -> [...]."""
    best, second = logits.float().topk(2, dim=-1).values.unbind(-1)
    return (best - second) / logits.float().abs().amax(-1)


def _fill_hf(cache, subject: Subject, settings: Settings, context: int) -> None:
    slots: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for layer, _, key, value in _cached(subject, settings.batch_size, context):
        slots.setdefault(layer, []).append((key, value))
    for layer, pairs in slots.items():
        keys, values = (torch.stack(side) for side in zip(*pairs, strict=True))
        cache.update(keys, values, layer)


def _cached(subject: Subject, count: int, context: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield (layer, slot, keys, values), with keys and values [key heads, context, head size], equal at every call."""
    decoder = subject.config.decoder
    generator = torch.Generator().manual_seed(1)
    for layer in range(decoder.num_layers):
        for slot in range(count):
            both = torch.randn(2, decoder.num_kv_heads, context, decoder.head_dim, generator=generator)
            key, value = both.to(subject.device, subject.dtype)
            yield layer, slot, key, value


def _first_tokens(count: int, rotation: int) -> list[int]:
    return [10 + 7 * rotation + number for number in range(count)]


def _rows_of_prompt(subject: Subject, settings: Settings) -> int:
    """The rows of a prompt with one image."""
    image = photographs(settings)[0]
    pieces = subject.processor.pieces(subject.processor.outline({"prompt": PROMPT, "images": [image]}), [])
    return sequence_length(pieces)
