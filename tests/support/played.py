"""Graphs of decoding steps that a CPU can play: a replay runs the recorded step again on its static tensors, as they
are then, and gives what it would give."""

import torch

from llava_fast.generation.device_sampling import DeviceSteps
from llava_fast.generation.runner import Runner
from llava_fast.generation.scheduler import Scheduler
from llava_fast.models.decode_graphs import DecodeGraphs
from llava_fast.models.encode_graphs import EncodeGraphs


class Playing:
    """A replay runs the recorded step, of which only tensors can have changed."""

    devices = ("cpu",)
    captures = 0
    replays = 0

    def capture(self, step):
        self.captures += 1
        out = step()
        out = torch.full_like(out, torch.nan if out.is_floating_point() else -7)

        def replay():
            self.replays += 1
            out.copy_(step())

        return replay, out


class Played(Playing, DecodeGraphs):
    """Decoding steps, of paged_attention's reference too."""

    def has_kernel(self, step):
        return True


class PlayedEncoding(Playing, EncodeGraphs):
    """From tiles to the decoder's inputs."""


def scheduler_of(model, graphs=None, block_rows=16, blocks=None, prefixes=None, **options) -> Scheduler:
    """A scheduler whose runner plays `graphs`."""
    cache = model.decoder.new_cache(block_rows=block_rows)
    cache.max_blocks = blocks or 400
    runner = Runner(model, cache, device=DeviceSteps(graphs(model.decoder, cache)) if graphs else None)
    return Scheduler(runner, prefixes(cache) if prefixes else None, **options)
