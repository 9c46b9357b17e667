"""`Llava`: the model that `load` returns, with generate, stream and chat on the scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch

from llava_fast.errors import LlavaFastError, RequestError
from llava_fast.generation.chat import Chat
from llava_fast.generation.device_sampling import DeviceSteps
from llava_fast.generation.prompt import read_prompt
from llava_fast.generation.ranking import Candidate, score_candidates
from llava_fast.generation.runner import Runner
from llava_fast.generation.sampling import Sampling
from llava_fast.generation.scheduler import Scheduler
from llava_fast.generation.sequence import Generation, new_sequence
from llava_fast.generation.sequence import Sequence as Running
from llava_fast.models.encode_graphs import EncodeGraphs
from llava_fast.models.paged_cache import PagedCache
from llava_fast.models.vlm import LlavaModel


class Llava(LlavaModel):
    """A loaded checkpoint: an ordinary nn.Module that also answers requests."""

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[dict] | dict, sampling: Sampling | None = None, **options: Any
    ) -> list[Generation]:
        """Answer a batch of requests; each answer is that of its request alone.

        requests  dicts {"prompt" | "messages", "images", "video", "seed"}; see inputs.processor.
        sampling  how to generate (see Sampling); default: greedy, at most 128 tokens.
        options   fields of Sampling by keyword, which override those of `sampling`.

        Raises RequestError or ImageError naming the request, CacheFullError for one that memory cannot hold, and
        GenerationError if the model's logits are not numbers.
        """
        requests = [requests] if isinstance(requests, dict) else list(requests)
        sequences = self._sequences(requests, Sampling.of(sampling, **options))
        for _ in self._steps(requests, sequences):
            pass
        return [sequence.result() for sequence in sequences]

    def stream(self, request: dict, sampling: Sampling | None = None, **options: Any) -> Iterator[str]:
        """Text pieces of one answer as soon as they are final: never part of a character or of a stop string. Their
        concatenation equals the text that `generate` returns. Arguments and errors as for `generate`; errors in the
        request are raised immediately.
        """
        sequences = self._sequences([request], Sampling.of(sampling, **options), pieces=True)
        return (piece for moved in self._steps([request], sequences) for _, piece in moved if piece)

    def chat(self, system: str | None = None) -> Chat:
        """A conversation on one cache: an image is encoded once, however many questions follow."""
        return Chat(self, system)

    def rank(
        self,
        request: dict,
        candidates: Sequence[str],
        by: Literal["sum", "mean"] = "sum",
        end_of_turn: bool = False,
    ) -> list[Candidate]:
        """Candidate answers to a request, likeliest first; equal ones in the order given. The prompt runs once.

        request      as for `generate`; "messages" end with the user's turn.
        candidates   the texts: answers to "messages", continuations of a verbatim "prompt".
        by           order by the sum of the log-probabilities of a candidate's tokens (as InstructBLIP's code ranks) or
                     by their mean, which does not favour short candidates. Both are in the result.
        end_of_turn  also score the tokens that end the assistant's turn (see generation.ranking).

        Raises as `generate` does, and RequestError for an empty candidate.
        """
        if by not in ("sum", "mean"):
            raise ValueError(f"by is {by!r}: use 'sum' or 'mean'")
        (found,) = score_candidates(self, [request], [candidates], end_of_turn)
        of = {"sum": lambda each: -each.log_likelihood, "mean": lambda each: -each.mean_log_likelihood}
        return sorted(found, key=of[by])

    def _sequences(self, requests: list[dict], sampling: Sampling, pieces: bool = False) -> list[Running]:
        """A sequence for each request. `pieces`: as for TextDecoder."""
        sequences = []
        for number, request in enumerate(requests):
            prompt = read_prompt(self.processor, request, number)
            seed = request.get("seed")
            if seed is None and sampling.seed is not None:
                seed = sampling.seed + number
            limit = self.config.decoder.context_length
            if prompt.rows >= limit and sampling.max_new_tokens:
                name = request.get("id", number)
                raise RequestError(f"request {name} fills the context of {limit} tokens: no room for an answer")
            sequences.append(new_sequence(self, prompt, sampling, seed, pieces))
        return sequences

    def _steps(self, requests: list[dict], sequences: list[Running]) -> Iterator[list[tuple[Running, str]]]:
        """Run the sequences to their ends; yields the sequences that advanced at each step. A sequence that fails
        raises its error.
        """
        runner = _runner_of(self)
        scheduler = Scheduler(runner)
        try:
            for sequence in sequences:
                scheduler.add(sequence)
            while not scheduler.is_idle:
                moved = scheduler.step()
                for sequence, _ in moved:
                    if sequence.error is not None:
                        number = sequences.index(sequence)
                        _raise(sequence.error, requests[number].get("id", number))
                yield moved
        finally:
            for sequence in sequences:
                scheduler.cancel(sequence)
            _idle[self] = _Idle(runner.cache, runner.device, runner.encoder)


class _Idle(NamedTuple):
    cache: PagedCache
    device: DeviceSteps | None
    encoder: EncodeGraphs | None


_idle: WeakKeyDictionary[Llava, _Idle] = WeakKeyDictionary()
"""Each model's idle cache and the captured graphs, for the next call: new memory causes page faults, and capturing
takes time."""
KEPT_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


def _runner_of(model: Llava) -> Runner:
    idle = _idle.pop(model, None)  # a concurrent call in another thread creates its own
    if idle is None or idle.cache.used_blocks:
        return Runner(model)
    cache, device, encoder = idle if model.cuda_graphs else (idle.cache, None, None)
    if [(part.form, part.first_layer) for part in cache.parts] != model.decoder.cache_forms:
        return Runner(model)
    cache.reopen(KEPT_BYTES.get(cache.device.type, 0))
    return Runner(model, cache, device=device, encoder=encoder)


def _raise(error: Exception, name: Any) -> NoReturn:
    if isinstance(error, LlavaFastError):
        raise type(error)(f"request {name}: {error}") from error
    raise error
