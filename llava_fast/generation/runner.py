"""Runs the model for sequences with room in its cache: prompts in chunks, answers a token at a time."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from llava_fast.generation.device_sampling import DeviceSteps, Flight
from llava_fast.generation.feature_cache import FeatureCache
from llava_fast.generation.prompt import Part, Prompt
from llava_fast.generation.sequence import Sequence
from llava_fast.inputs.plan.plan import TextPiece, VisualPiece, sequence_length
from llava_fast.inputs.tiling.rows import FEATURE
from llava_fast.models.batch import Batch
from llava_fast.models.blocks.attention import Spans
from llava_fast.models.blocks.native_step import MAX_ROWS
from llava_fast.models.decode_graphs import DecodeGraphs
from llava_fast.models.decoders.stack import Decoder
from llava_fast.models.encode_graphs import EncodeGraphs
from llava_fast.models.paged_cache import PagedCache
from llava_fast.models.vlm import LlavaModel

Chunk = tuple[Sequence, int]
"""A sequence and how many of its next rows to run."""
MOST_ROUTES = 4096  # images whose remaining rows are remembered


class Runner:
    """Owns a model and its cache. Every sequence passed to it must have a table with room for the rows that are run.

    features         caches encoded images for later prompts that contain them; None: images are always encoded.
    batch_invariant  each sequence's logits equal those it would get alone, bit for bit: a prompt runs in its own passes
                     and reuses nothing, and the head and decoding steps run a row at a time, except where decoder_step
                     applies (plain float32 weights on a CPU). Not together with `features`.
    device, encoder  CUDA graphs of decoding (already captured on this cache) and of encoding; None: on CUDA they are
                     captured when first needed, unless model.cuda_graphs is False.
    """

    def __init__(
        self,
        model: LlavaModel,
        cache: PagedCache | None = None,
        features: FeatureCache | None = None,
        batch_invariant: bool = False,
        device: DeviceSteps | None = None,
        encoder: EncodeGraphs | None = None,
    ) -> None:
        if batch_invariant and features is not None:
            raise ValueError("batch_invariant and features: images would be encoded otherwise than alone")
        self.model, self.features, self.batch_invariant = model, features, batch_invariant
        self.cache = model.decoder.new_cache() if cache is None else cache
        captures = self.cache.device.type == "cuda" and model.cuda_graphs and not batch_invariant
        if device is None and captures and isinstance(model.decoder, Decoder) and not self.cache.codes:
            device = DeviceSteps(DecodeGraphs(model.decoder, self.cache))  # a hosted decoder is transformers' own
        if encoder is None and captures:
            encoder = EncodeGraphs(model)
        self.device, self.encoder = device, encoder
        self._routes: OrderedDict[int, np.ndarray] = OrderedDict()
        decoder = model.config.decoder
        self.grows_from = decoder.max_positions if decoder.rope.kind in ("dynamic", "by_prompt") else None
        self.dynamic_from = self.grows_from if decoder.rope.kind == "dynamic" else None

    def may_reuse(self, sequence: Sequence) -> bool:
        """Whether this prompt may reuse rows cached by another sequence. Where RoPE grows, the keys of a prompt longer
        than the decoder's trained length depend on that prompt's length.
        """
        if self.batch_invariant or sequence.prompt.encoded_rows:  # an encoder's rows depend on the whole prompt
            return False
        return not self._grown([sequence])

    def _grown(self, sequences: SequenceOf[Sequence]) -> bool:
        """Whether a prompt among these is longer than the decoder's trained length, and its RoPE another."""
        limit = self.grows_from
        return limit is not None and any(sequence.prompt.rows > limit for sequence in sequences)

    def _prompts(self, sequences: SequenceOf[Sequence]) -> tuple[int, ...]:
        """Spans.prompts, where RoPE needs them."""
        return () if self.grows_from is None else tuple([sequence.prompt.rows for sequence in sequences])

    def chunk_rows(self, sequence: Sequence, most: int) -> int:
        """How many of a sequence's next rows to run in one pass: at most `most`, or all rows with the same base under
        dynamic RoPE, or a whole prompt that an encoder reads.
        """
        done, left = sequence.cached.length, sequence.rows - sequence.cached.length
        prompt, limit = sequence.prompt.rows, self.dynamic_from
        if self.batch_invariant and done >= prompt:
            return 1
        if self.batch_invariant:
            left = prompt - done
        if done < prompt and sequence.prompt.encoded_rows:
            return prompt - done
        if limit is None or sequence.rows <= limit:
            return min(left, most)
        if done < prompt:
            return prompt - done if prompt > limit else min(prompt - done, most)
        return min(limit - done, most) if done < limit else 1  # the answer's rows had one RoPE base each

    def route(self, sequence: Sequence) -> bool:
        """Replace a sequence's prompt by that without the optional rows that the model's router leaves out. Encodes
        images, unless the remaining rows of the same image with the same text are known; returns whether it did. The
        answer may have the rows that are left out.
        """
        prompt = sequence.prompt
        if self.model.config.router is not None and any(_is_routed(part) for part in prompt.parts):
            if prompt.routed is None:
                prompt.routed = Prompt([self._routed(part) for part in prompt.parts])
            sequence.prompt = prompt.routed
            room = min(self.model.config.decoder.context_length, self.cache.max_blocks * self.cache.block_rows)
            sequence.limit = min(sequence.sampler.options.max_new_tokens, room - sequence.prompt.rows)
            return any(part.made is not None for part in sequence.prompt.parts)
        return False

    def _routed(self, part: Part) -> Part:
        if not _is_routed(part):
            return part
        assert isinstance(part.piece, VisualPiece)
        rows, key, made = part.piece.rows, part.key, None
        stays = self._routes.get(key)
        if stays is None:
            prepared = self.model.own_processor.assemble([[part.piece]], list(part.tiles))
            inputs = self.model.routed(Batch.from_prepared(prepared, self.model.device))
            made = inputs.embeds
            stays = (rows.kind != FEATURE) | np.isin(rows.index, inputs.batch.plan.column("kept"))
            self._routes[key] = stays
            while len(self._routes) > MOST_ROUTES:
                self._routes.popitem(last=False)
        piece = dataclasses.replace(part.piece, rows=rows.only(stays))
        return Part(piece, part.tiles, encoded=made is not None, made=made)

    def prefill(self, chunks: SequenceOf[Chunk]) -> Tensor | None:
        """Run the next rows of some sequences. Returns logits [sequences, vocabulary] after the last row of each
        sequence whose rows are then all cached, in order; None if there is no such sequence. `advance` ends the pass.
        """
        embeddings = self._embed(chunks)
        tables = tuple(sequence.cached for sequence, _ in chunks)
        lengths = tuple(rows for _, rows in chunks)
        before = tuple(table.length for table in tables)
        ends = np.cumsum(lengths)
        of_pass = [sequence for sequence, _ in chunks]
        encoded, prompts = self._encoded_rows(of_pass), self._prompts(of_pass)
        starts = tuple((ends - lengths).tolist())
        spans = Spans(starts, lengths, tables, before, encoded=encoded, prompts=prompts)
        position = np.concatenate([np.arange(b, b + n) for b, n in zip(before, lengths, strict=True)])
        last = [int(end) - 1 for chunk, end in zip(chunks, ends, strict=True) if is_last(*chunk)]
        both = torch.from_numpy(np.concatenate([position, last or [0]])).to(embeddings.device)  # one transfer
        hidden = self.model.decoder.rows_of(
            embeddings, both[: len(position)], spans, self.cache, wanted=both[len(position) :]
        )
        return self._logits(hidden) if last else None

    @staticmethod
    def advance(chunks: SequenceOf[Chunk]) -> None:
        """Count rows that `prefill` or `step` has run as cached. Until then the same pass may be run again."""
        for sequence, rows in chunks:
            sequence.cached.length += rows
            if sequence.embedded is not None:
                first, waiting = sequence.embedded
                sequence.embedded = (first + rows, waiting[rows:].clone()) if rows < len(waiting) else None

    def launch(self, sequences: SequenceOf[Sequence]) -> Flight | None:
        """Run the last token of each sequence, even one that the host does not know yet, and choose the next on the
        device; does not wait. None where `step` and the host must. `advance` ends the pass."""
        if self.device is None or self.batch_invariant or self._grown(sequences):
            return None
        return self.device.launch(sequences)

    def release(self, sequences: SequenceOf[Sequence]) -> None:
        """Free what `launch` keeps on the device for sequences that leave."""
        if self.device is not None:
            self.device.release(sequences)

    def step(self, sequences: SequenceOf[Sequence]) -> Tensor:
        """Run the last token of each sequence; logits [sequences, vocabulary] of the next. The next step may
        overwrite them. `advance` ends the pass."""
        if self.batch_invariant:
            groups = range(0, len(sequences), MAX_ROWS)
            return self._logits(torch.cat([self._step(sequences[i : i + MAX_ROWS]) for i in groups]))
        self.release(sequences)  # the host will choose these tokens, so the device's state is stale
        graphs = None if self.device is None or self._grown(sequences) else self.device.graphs
        replayed = None if graphs is None else self._replay(graphs, sequences)
        return self._logits(self._step(sequences)) if replayed is None else replayed

    def _replay(self, graphs: DecodeGraphs, sequences: SequenceOf[Sequence]) -> Tensor | None:
        """Logits from a CUDA graph, or None if there is none for this step."""
        tables = [sequence.cached for sequence in sequences]
        return graphs([s.token_ids[-1] for s in sequences], tables, [table.length for table in tables])

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.model.decoder.logits
        return torch.cat([logits(row) for row in hidden.split(1)]) if self.batch_invariant else logits(hidden)

    def _step(self, sequences: SequenceOf[Sequence]) -> Tensor:
        """Final hidden states [sequences, C] of their last tokens."""
        decoder = self.model.decoder
        tables = tuple([sequence.cached for sequence in sequences])
        before = tuple([table.length for table in tables])
        tokens = [sequence.token_ids[-1] for sequence in sequences]
        token, position = torch.from_numpy(np.array([tokens, before])).to(decoder.device)  # one transfer for both
        encoded, prompts = self._encoded_rows(sequences), self._prompts(sequences)
        starts = tuple(range(len(tables)))
        spans = Spans(starts, (1,) * len(tables), tables, before, encoded=encoded, prompts=prompts)
        embeddings = decoder.embed_tokens(token)
        if self.batch_invariant and len(sequences) > 1 and not decoder.steps_natively(embeddings, spans):
            return torch.cat([self._step([sequence]) for sequence in sequences])
        return decoder(embeddings, position, spans, self.cache)

    def _encoded_rows(self, sequences: SequenceOf[Sequence]) -> tuple[int, ...]:
        """See Spans.encoded."""
        if self.model.config.decoder.answer_start is None:
            return ()
        return tuple([sequence.prompt.encoded_rows for sequence in sequences])

    def _embed(self, chunks: SequenceOf[Chunk]) -> Tensor:
        """The decoder's inputs [rows, C] for all chunks, concatenated. An image is encoded completely when its first
        row runs, together with those of all chunks; rows beyond the chunk are kept in `sequence.embedded`.
        """
        needed: list[tuple[Sequence, int]] = []
        parts: list[list[Part]] = []
        begins: list[int] = []
        for sequence, rows in chunks:
            first = sequence.cached.length
            start = first if sequence.embedded is None else sequence.embedded[0] + len(sequence.embedded[1])
            if start < first + rows:
                of_sequence, begin = sequence.between(start, first + rows)
                needed.append((sequence, start))
                parts.append(of_sequence)
                begins.append(begin)
        if needed:
            ready = any(part.made is not None for of_sequence in parts for part in of_sequence)
            found = self._encoded(parts) if self.features is None and not ready else self._found(parts, self.features)
            for (sequence, start), begin, embedded in zip(needed, begins, found, strict=True):
                new = embedded[start - begin :]
                if sequence.embedded is None:
                    sequence.embedded = (start, new)
                else:
                    sequence.embedded = (sequence.embedded[0], torch.cat([sequence.embedded[1], new]))
        taken = [sequence.embedded[1][:rows] for sequence, rows in chunks if sequence.embedded is not None]
        return torch.cat(taken) if len(taken) > 1 else taken[0]

    def _found(self, sequences: list[list[Part]], features: FeatureCache | None) -> SequenceOf[Tensor]:
        """As `_encoded`, but each distinct image is encoded at most once, and cached ones not at all."""
        visual = {part.key: part for parts in sequences for part in parts if part.is_visual}
        rows = {key: part.made for key, part in visual.items() if part.made is not None}
        if features is not None:
            for key, made in rows.items():
                features.put(key, made)
            rows |= {key: known for key in visual.keys() - rows if (known := features.get(key)) is not None}
        new = [key for key in visual if key not in rows]
        if new:
            for key, made in zip(new, self._encoded([[visual[key]] for key in new]), strict=True):
                rows[key] = made
                if features is not None:
                    features.put(key, made)
        for part in visual.values():
            part.made = None  # from here on the sequence has it
        found = []
        for parts in sequences:
            pieces = [rows[part.key] if part.is_visual else self._encoded([[part]])[0] for part in parts]
            found.append(torch.cat(pieces) if len(pieces) > 1 else pieces[0])
        return found

    def _encoded(self, sequences: list[list[Part]]) -> SequenceOf[Tensor]:
        """The decoder's inputs [rows, C] for the parts of each sequence."""
        pieces = [[part.piece for part in parts] for parts in sequences]
        if not any(part.is_visual for parts in sequences for part in parts):  # text needs no plan
            ids = np.concatenate([p.ids for of_sequence in pieces for p in of_sequence if isinstance(p, TextPiece)])
            token = torch.from_numpy(ids).to(self.model.device, torch.long)
            return self.model.decoder.embed_tokens(token).split(list(map(sequence_length, pieces)))
        for part in (each for parts in sequences for each in parts):
            part.encoded = part.is_visual
        tiles = [cut for parts in sequences for part in parts for cut in part.tiles]
        batch = Batch.from_prepared(self.model.own_processor.assemble(pieces, tiles), self.model.device)
        embeds = self.model.inputs_embeds(batch) if self.encoder is None else self.encoder.encode(batch)
        return embeds.split(batch.plan.lengths)


def _is_routed(part: Part) -> bool:
    """Whether it has optional rows."""
    return isinstance(part.piece, VisualPiece) and part.piece.rows.optional is not None


def is_last(sequence: Sequence, rows: int) -> bool:
    """Whether these are the last rows of the sequence."""
    return sequence.cached.length + rows == sequence.rows
