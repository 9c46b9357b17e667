"""End-to-end generation from photographs and prompts to text, including preprocessing and prefill. llama.cpp as a peer
runs only its decoder, with the same numbers of prompt rows and new tokens. --new-tokens 1 gives the time to first
token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import checks, llama_cpp
from benchmarks.case import Case, Provider, Settings
from benchmarks.checks import Greedy
from benchmarks.floors import generate_floor
from benchmarks.inputs import PROMPT, ROTATED, describe, hf_inputs, inference, photographs, requests, sizes
from benchmarks.subject import Subject
from benchmarks.suites.decode import gaps


def cases(subject: Subject, settings: Settings) -> Iterator[Case]:
    model, steps = subject.as_loaded, settings.new_tokens
    images = [photographs(settings, number) for number in range(ROTATED)]
    asked = [requests(settings, number) for number in range(ROTATED)]
    batch = model.prepare(asked[0])

    def ours(number: int):
        return model.generate(asked[number % ROTATED], max_new_tokens=steps, ignore_eos=True)

    def hf(theirs, **options):
        def run(number: int):
            processor = subject.hf_processor
            batch = images[number % ROTATED]
            inputs = processor(images=batch, text=[PROMPT] * len(batch), return_tensors="pt").to(subject.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(subject.dtype)
            answer = theirs.generate(**inputs, max_new_tokens=steps, do_sample=False, **options)
            new = answer[:, inputs["input_ids"].shape[1] :]
            return new, processor.batch_decode(new, skip_special_tokens=True)

        def result(returned) -> Greedy:
            with torch.inference_mode():
                inputs = hf_inputs(subject, settings)
                answer = theirs.generate(
                    **inputs,
                    max_new_tokens=steps,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                    **options,
                )
            return Greedy(returned[0].tolist(), gaps(torch.stack(answer.logits, 1)).tolist())

        return run, result

    def provider(name: str) -> Provider:
        if name == "llava_fast":
            return Provider(name, inference(ours), lambda answers: Greedy([a.token_ids for a in answers]))
        compiled = name == "hf-compile"
        options = {"cache_implementation": "static"} if compiled else {}
        run, result = hf(subject.hf_compiled if compiled else subject.hf, **options)
        return Provider(name, inference(run), result, compiles=compiled)

    yield Case(
        suite="generate",
        model=subject.label,
        real_width=subject.real_width,
        label=f"{describe(settings, batch)}, {steps} new tokens",
        providers=[provider(name) for name in settings.providers],
        check=checks.same_greedy(settings.dtype),
        floor=generate_floor(subject.config, sizes(batch), steps, subject.dtype.itemsize, subject.decoder_itemsize),
        items=steps * settings.batch_size,
        unit="tokens",
        weight_bytes=subject.weight_bytes,
        peers=llama_cpp.peers(subject, settings, prompt=sum(batch.plan.lengths), new_tokens=steps),
    )
