"""T5 (Raffel et al. 2020; 1.1 and Flan-T5 too), hosted: an encoder reads the prompt, a decoder writes the answer.

Both halves of a sequence are its rows, the prompt's first (`Spans.encoded`), the first of the answer being the token
`answer_start`. So batches, placement, labels, branches and the KV cache are those of any decoder. In the cache a
prompt's row holds its keys and values of cross-attention, an answer's row those of self-attention, which have the same
shape; a prompt runs in one pass. transformers' modules hold the weights; attention is here, because theirs takes one
rectangle of sequences. Positions are relative, so their number has no limit but `MOST_ROWS`; n_positions, which
transformers ignores, is kept and not used.

Shapes: R rows (all sequences end to end), E of them the encoder's, A the decoder's; C width, H heads, D head size.
Source: transformers 5.17-5.24 modeling_t5.py, configuration_t5.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from llava_fast.models.blocks.attention import Spans
from llava_fast.models.decoders.base import BaseDecoder, reserve
from llava_fast.models.decoders.hosted import HostedConfig, own_fields
from llava_fast.models.paged_cache import BlockTable, PagedCache
from llava_fast.models.paged_rows import to_device
from llava_fast.models.recompute import Recompute, run_layer
from llava_fast.storage.bounds import Layers, Positive, Size
from llava_fast.storage.files import Fields

MOST_ROWS = 4096
"""Rows of a prompt and its answer: a bound on the memory of attention, whose position bias is a matrix."""


class T5Fields(Fields):
    """The fields read from its section of config.json."""

    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    d_model: Size
    d_kv: Size
    d_ff: Size
    num_layers: Layers
    num_decoder_layers: Layers
    num_heads: Size
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=2**16)]
    relative_attention_max_distance: Annotated[int, Field(ge=2, le=2**24)]
    layer_norm_epsilon: Positive
    feed_forward_proj: str


@dataclass(frozen=True, kw_only=True)
class T5Config(HostedConfig):
    """T5. `num_layers` are the decoder's. `scale_outputs`: the head reads rows divided by the root of their width, as
    the first T5, whose head is the embedding."""

    family = "t5"
    embedding_name = "base.shared"
    layers_name = "base"
    hf_fields = T5Fields
    layers_field = "num_layers"
    tied_by_file = True  # transformers 5 ties every T5's head whose file has none, and says so in config.json
    overflows_in = (torch.float16,)

    start_token: int
    scale_outputs: bool

    @property
    def answer_start(self) -> int:
        return self.start_token

    def build(self) -> T5Decoder:
        return T5Decoder(self)

    def base_model(self, hf: Any) -> Any:
        """transformers' T5 without a head and without the copies of its embedding."""
        from transformers import T5Model

        model: Any = T5Model(hf)
        for stack, run in ((model.encoder, _encode), (model.decoder, _decode)):
            del stack.embed_tokens
            for block in stack.block:
                block.forward = functools.partial(run, block)
                dense = block.layer[-1].DenseReluDense
                dense.forward = functools.partial(_feed, dense)  # theirs asks for the dtype of a weight
        return model

    @functools.cached_property
    def _linears(self) -> list[nn.Linear]:
        """A decoder's layer's, without those for keys and values of the prompt. A prompt's row passes those, and as
        many others in the encoder: where both halves are equally deep, each row passes as many products."""
        hf = self.hf_config()
        hf.num_layers = hf.num_decoder_layers = 1
        with torch.device("meta"):
            block = self.base_model(hf).decoder.block[0]
        across = block.layer[1].EncDecAttention
        own = (module for module in block.modules() if isinstance(module, nn.Linear))
        return [linear for linear in own if linear is not across.k and linear is not across.v]

    def pairs(self, layer: int, length: int) -> int:
        """As if the encoder read all rows."""
        return length**2

    @classmethod
    def from_hf(cls, hf: Any, tied: bool) -> T5Config:
        scaled = bool(getattr(hf, "scale_decoder_outputs", tied))
        start = getattr(hf, "decoder_start_token_id", None)
        if start is None:
            start = 0 if hf.pad_token_id is None else hf.pad_token_id  # transformers writes no default
        if not 0 <= start < hf.vocab_size:
            raise ValueError(f"decoder_start_token_id is {start}; the vocabulary has {hf.vocab_size} tokens")
        config = cls(
            vocab_size=hf.vocab_size,
            hidden_size=hf.d_model,
            num_layers=hf.num_decoder_layers,
            num_heads=hf.num_heads,
            num_kv_heads=hf.num_heads,
            head_dim=hf.d_kv,
            max_positions=MOST_ROWS,
            tie_embeddings=scaled,
            start_token=start,
            scale_outputs=scaled,
            fields=own_fields(hf),
        )
        config.check_builds()
        return config

    def to_hf(self) -> dict[str, Any]:
        """transformers 5 reads from tie_word_embeddings whether outputs are scaled."""
        own = {"is_encoder_decoder": True, "decoder_start_token_id": self.start_token}
        scaled = {"tie_word_embeddings": self.scale_outputs, "scale_decoder_outputs": self.scale_outputs}
        return super().to_hf() | own | scaled


class T5Decoder(BaseDecoder):
    """Encoder, decoder and head. `forward` returns the encoder's outputs in a prompt's rows, and the decoder's, ready
    for the head, in an answer's."""

    config: T5Config

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.base = config.base_model(config.hf_config())
        self.recompute: Recompute = "none"
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def embed_tokens(self) -> Any:  # type: ignore[override]
        return self.base.shared

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """Those of both halves."""
        return nn.ModuleList([*self.base.encoder.block, *self.base.decoder.block])

    def forward(self, x_RC: Tensor, position_R: Tensor, spans: Spans, cache: PagedCache | None = None) -> Tensor:
        if not len(x_RC):  # of a process without samples: every module must run
            two = x_RC.new_zeros(2, x_RC.shape[1])
            return x_RC + self(two, position_R.new_zeros(2), Spans((0,), (2,), encoded=(1,)))[:0]
        if cache is not None:
            reserve(spans)
        memo = spans.memo.setdefault(x_RC.device, {})
        if not memo:
            memo["rows"] = _Rows.of(spans, cache, x_RC.device)
        rows: _Rows = memo["rows"]
        encoded = None
        out_RC = torch.zeros_like(x_RC)
        if rows.prompts:
            encoded = self._run(self.base.encoder, x_RC[rows.encoder], rows)
            out_RC = out_RC.index_copy(0, rows.encoder, encoded.to(out_RC.dtype))
        if len(rows.decoder):
            hidden = self._run(self.base.decoder, x_RC[rows.decoder], rows, encoded)
            if self.config.scale_outputs:
                hidden = hidden * self.config.hidden_size**-0.5
            out_RC = out_RC.index_copy(0, rows.decoder, hidden.to(out_RC.dtype))
        return out_RC

    def _run(self, stack: Any, x: Tensor, rows: _Rows, *more: Tensor | None) -> Tensor:
        bias = None
        for block in stack.block:
            x, bias = run_layer(self.recompute, block, x, rows, bias, *more)
        return stack.final_layer_norm(x)


@dataclass(frozen=True)
class _Answer:
    """A sequence's rows in the decoder: its own [start, end) of A, its prompt's [first, last) of E, unless they are
    cached; its number among the sequences, how many of the prompt's rows and of its own are cached, its branches."""

    start: int
    end: int
    first: int
    last: int
    number: int
    prompt: int
    before: int
    branches: tuple[int, ...]

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """(first row, end, rows before them that they attend to) of each run of rows that follow one another: all, or
        the rows up to the end of the first branch, then each further branch after the common prefix."""
        if len(self.branches) < 2:
            yield self.start, self.end, 0
            return
        prefix = self.end - sum(self.branches)
        at = prefix + self.branches[0]
        yield self.start, at, 0
        for branch in self.branches[1:]:
            if branch:
                yield at, at + branch, prefix - self.start
            at += branch


@dataclass(frozen=True)
class _Rows:
    """How a pass's rows go to encoder and decoder: `encoder`, `decoder` are their indices [E], [A]; `prompts` the
    numbers of rows of the prompts that the encoder reads; `one_each`: every sequence decodes one more row."""

    tables: tuple[BlockTable, ...]
    before: tuple[int, ...]
    encoded: tuple[int, ...]
    cache: PagedCache | None
    encoder: Tensor
    decoder: Tensor
    prompts: list[int]
    answers: list[_Answer]
    one_each: bool
    memo: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, spans: Spans, cache: PagedCache | None, device: torch.device) -> _Rows:
        if len(spans.encoded) != len(spans.lengths):
            raise ValueError("an encoder-decoder needs the number of rows of each prompt: Spans(encoded=...)")
        encoder: list[np.ndarray] = [np.zeros(0, np.int64)]
        decoder: list[np.ndarray] = [np.zeros(0, np.int64)]
        prompts, answers, first, start = [], [], 0, 0
        for number, (at, length, prompt) in enumerate(zip(spans.starts, spans.lengths, spans.encoded, strict=True)):
            before = spans.before[number] if spans.before else 0
            new = 0 if before else prompt
            if not prompt or new > length or 0 < before < prompt:
                raise ValueError(f"sequence {number}: an encoder reads all {prompt} rows of a prompt in one pass")
            branches = spans.branches[number] if spans.branches else ()
            rows = length - new
            if branches and sum(branches) >= rows:
                raise ValueError(f"sequence {number}: branches follow at least the first row of an answer")
            encoder.append(np.arange(at, at + new))
            decoder.append(np.arange(at + new, at + length))
            cached = max(before - prompt, 0)
            answers.append(_Answer(start, start + rows, first, first + new, number, prompt, cached, branches))
            prompts += [new] if new else []
            first, start = first + new, start + rows
        one_each = cache is not None and all(length == 1 for length in spans.lengths)
        of_encoder, of_decoder = (to_device(np.concatenate(each), device) for each in (encoder, decoder))
        known = spans.tables, spans.before, spans.encoded, cache
        return cls(*known, of_encoder, of_decoder, prompts, answers, one_each)


def _encode(block: Any, x_EC: Tensor, rows: _Rows, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Replaces the forward of an encoder's block; `bias` [H, N, N] for the longest prompt, made by the first."""
    inner, feed = block.layer
    attention, normed = inner.SelfAttention, inner.layer_norm(x_EC)
    query, key, value = (_heads(attention, part(normed)) for part in (attention.q, attention.k, attention.v))
    if bias is None:
        at = torch.arange(max(rows.prompts), device=x_EC.device)
        bias = _position_bias(attention, at - at[:, None], True).permute(2, 0, 1).to(query.dtype)
    prompts = zip(*(part.split(rows.prompts, 1) for part in (query, key, value)), strict=True)
    made = [_attend(q, k, v, bias[:, : q.shape[1], : q.shape[1]]) for q, k, v in prompts]
    return feed(x_EC + attention.o(torch.cat(made))), bias


def _decode(
    block: Any, x_AC: Tensor, rows: _Rows, bias: Tensor | None, encoded_EC: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Replaces the forward of a decoder's block. `bias` [H, N, N] for the longest answer, or [S, H, 1, T] over all rows
    of S sequences that decode one more each; made by the first block."""
    own, across, feed = block.layer
    attention, cross = own.SelfAttention, across.EncDecAttention
    normed = own.layer_norm(x_AC)
    query, key, value = (_heads(attention, part(normed)) for part in (attention.q, attention.k, attention.v))
    if rows.one_each:
        assert rows.cache is not None
        new = key.transpose(0, 1), value.transpose(0, 1)
        keys, values, _ = rows.cache.append_one_each(attention.layer_idx, rows.tables, rows.before, *new, None)
        if bias is None:
            bias = _step_bias(attention, rows, keys.shape[2], x_AC.device).to(query.dtype)
        prompt = _prompt_mask(rows, keys.shape[2], x_AC.device)
        x_AC = x_AC + attention.o(_attend(query.transpose(0, 1)[:, :, None], keys, values, bias)[:, 0])
        asked = _heads(cross, cross.q(across.layer_norm(x_AC)))
        made = _attend(asked.transpose(0, 1)[:, :, None], keys, values, prompt)[:, 0]
        return feed(x_AC + cross.o(made)), bias
    prompts = None if encoded_EC is None else [_heads(cross, part(encoded_EC)) for part in (cross.k, cross.v)]
    seen = [_seen(attention.layer_idx, rows, answer, (key, value), prompts) for answer in rows.answers]
    if bias is None:
        at = torch.arange(max(keys.shape[1] for (keys, _), _ in seen), device=x_AC.device)
        bias = _position_bias(attention, at - at[:, None], False).permute(2, 0, 1)
        bias = bias.masked_fill(at > at[:, None], -torch.inf).to(query.dtype)
    parts = []
    for answer, (of_answer, _) in zip(rows.answers, seen, strict=True):
        for start, end, shared in answer.parts():
            first = start - answer.start if shared else 0  # its own keys are those from here on
            last = answer.before + end - answer.start
            keys, values = (_after(shared, each, first, last) for each in of_answer)
            total = keys.shape[1]
            parts.append(_attend(query[:, start:end], keys, values, bias[:, total - (end - start) : total, :total]))
    x_AC = x_AC + attention.o(torch.cat(parts))
    asked = _heads(cross, cross.q(across.layer_norm(x_AC)))
    parts = [
        _attend(asked[:, answer.start : answer.end], keys, values, None)
        for answer, (_, (keys, values)) in zip(rows.answers, seen, strict=True)
    ]
    return feed(x_AC + cross.o(torch.cat(parts))), bias


def _feed(dense: Any, x: Tensor) -> Tensor:
    """Replaces the forward of an MLP, gated or not."""
    if hasattr(dense, "wi"):
        return dense.wo(dense.act(dense.wi(x)))
    return dense.wo(dense.act(dense.wi_0(x)) * dense.wi_1(x))


def _seen(
    layer: int, rows: _Rows, answer: _Answer, new: Sequence[Tensor], prompts: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values [H, rows, D] of the answer's rows, and of the prompt's, with the cached ones."""
    of_answer = [each[:, answer.start : answer.end] for each in new]
    of_prompt = None if prompts is None else [each[:, answer.first : answer.last] for each in prompts]
    if rows.cache is None:
        assert of_prompt is not None
        return of_answer, of_prompt
    if of_prompt is not None:
        of_answer = [torch.cat(each, 1) for each in zip(of_prompt, of_answer, strict=True)]
    table, before, end = rows.tables[answer.number], rows.before[answer.number], answer.prompt
    stored = rows.cache.append(layer, table, before, *of_answer)
    return [each[:, end:] for each in stored], [each[:, :end] for each in stored]


def _after(shared: int, rows: Tensor, first: int, last: int) -> Tensor:
    """Rows [first, last) of [H, R, D], after the first `shared` ones."""
    found = rows[:, first:last]
    return torch.cat([rows[:, :shared], found], 1) if shared else found


def _heads(attention: Any, rows: Tensor) -> Tensor:
    """[R, H * D] to [H, R, D]."""
    return rows.unflatten(-1, (attention.n_heads, -1)).transpose(0, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """[.., H, Q, D] over [.., H, T, D] to [.., Q, H * D]. Scores are not scaled."""
    alone = query.dim() == 3
    if alone:
        query, key, value = query[None], key[None], value[None]
        bias = None if bias is None else bias[None]
    made = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0).transpose(1, 2).flatten(2)
    return made[0] if alone else made


def _position_bias(attention: Any, distance: Tensor, both_ways: bool) -> Tensor:
    """[..., H] for key positions minus query positions [...]."""
    bucket: Callable[..., Tensor] = attention._relative_position_bucket
    buckets = attention.relative_attention_num_buckets, attention.relative_attention_max_distance
    return attention.relative_attention_bias(bucket(distance, both_ways, *buckets))


def _step_bias(attention: Any, rows: _Rows, total: int, device: torch.device) -> Tensor:
    """[S, H, 1, total]: -inf for other rows than the answer's."""
    at, prompt, before = _places(rows, total, device)
    bias = _position_bias(attention, (at - before).clamp(max=0), False)
    hidden = (at < prompt) | (at > before)
    return bias.masked_fill(hidden[:, :, None], -torch.inf).permute(0, 2, 1)[:, :, None]


def _prompt_mask(rows: _Rows, total: int, device: torch.device) -> Tensor:
    """bool [S, 1, 1, total]: the prompt's rows."""
    if "prompt" not in rows.memo:
        at, prompt, _ = _places(rows, total, device)
        rows.memo["prompt"] = (at < prompt)[:, None, None]
    return rows.memo["prompt"]


def _places(rows: _Rows, total: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(row numbers [total], rows of each prompt [S, 1], cached rows of each sequence [S, 1])."""
    both = to_device(np.array([rows.encoded, rows.before], np.int64), device)
    return torch.arange(total, device=device), both[0][:, None], both[1][:, None]
