"""Decoders that are transformers' own models: their modules run on packed rows, with this package's attention and
cache, so that packing, branches, chunked prefill and batched generation work for them too.

Shapes: R rows (all sequences end to end, see attention.Spans), C width. Parameter names are those of transformers' base
model. A model is one class here and one line in the registry, if its attention is called through transformers'
AttentionInterface. A config's dropout is not applied, as in this package's own decoders.
"""

from __future__ import annotations

import contextvars
import copy
import functools
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from llava_fast.models.blocks.attention import Spans, attend
from llava_fast.models.blocks.rope import RopeConfig
from llava_fast.models.decoders.base import BaseDecoder, DecoderConfig, Split, reserve
from llava_fast.models.paged_cache import PagedCache
from llava_fast.models.recompute import Recompute, run_layer
from llava_fast.storage.bounds import Layers, Size
from llava_fast.storage.files import Fields, one_line

_NAME = "llava_fast_rows"
_ROPES = ("default", "linear")
_UNSERVED = ("sliding_window", "softcap", "position_bias", "s_aux")


class HostedFields(Fields):
    """The fields read from its section of config.json; transformers checks the rest."""

    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**31)]


@dataclass(frozen=True, kw_only=True)
class HostedConfig(DecoderConfig):
    """A language model of transformers. `fields`: those of its config that not every config has."""

    hf_fields: ClassVar[type[Fields] | None] = HostedFields
    layers_field: ClassVar[str] = "num_hidden_layers"
    positions_field: ClassVar[str] = "max_position_embeddings"
    """Name of the config field with the number of positions."""

    fields: dict[str, Any] = field(repr=False, hash=False)

    def build(self) -> BaseDecoder:
        return HostedDecoder(self)

    def base_model(self, hf: Any) -> Any:
        """transformers' model without a head, whose attention is `attention` below."""
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModel

        AttentionInterface.register(_NAME, attention)
        AttentionMaskInterface.register(_NAME, _mask)
        return AutoModel.from_config(hf, attn_implementation=_NAME)

    def hf_config(self) -> Any:
        """Its transformers config, without dropout and without a padding row in the embedding."""
        from transformers import CONFIG_MAPPING

        fields = _without_dropout(self.fields) | {"vocab_size": self.vocab_size, "pad_token_id": None}
        return CONFIG_MAPPING[self.family].from_dict(fields)

    @property
    def layer_matrix_size(self) -> int:
        return sum(linear.in_features * linear.out_features for linear in self._linears)

    def kept_per_row(self, itemsize: int) -> tuple[int, int]:
        """An estimate: the inputs and outputs of its Linears, and two norms' inputs in float32."""
        products = self.hidden_size + sum(linear.out_features for linear in self._linears)
        read = sum(linear.in_features for linear in self._linears)
        return 8 * self.hidden_size + itemsize * (products + read), itemsize * products

    @functools.cached_property
    def _linears(self) -> list[nn.Linear]:
        """A layer's Linears, without storage."""
        with torch.device("meta"):
            layer = replace(self, num_layers=1, fields=self.fields | {self.layers_field: 1}).build().layers[0]
        return [module for module in layer.modules() if isinstance(module, nn.Linear)]

    @property
    def tensor_plan(self) -> dict[str, Split]:
        return {}

    @classmethod
    def from_hf(cls, hf: Any, tied: bool) -> HostedConfig:
        heads = hf.num_attention_heads
        if hf.hidden_size % heads:
            raise ValueError(f"a decoder of hidden_size {hf.hidden_size} has no {heads} equal num_attention_heads")
        rope = getattr(hf, "rope_parameters", None) or {}
        if (kind := rope.get("rope_type", "default")) not in _ROPES:
            raise ValueError(f"rope_type is {kind!r}; supported with a {cls.family} decoder are {', '.join(_ROPES)}")
        kv_heads = getattr(hf, "num_key_value_heads", None) or heads
        if heads % kv_heads:
            raise ValueError(f"{heads} num_attention_heads are not a multiple of {kv_heads} num_key_value_heads")
        cls.check(hf)
        config = cls(
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            num_layers=hf.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // heads,
            max_positions=getattr(hf, cls.positions_field),
            tie_embeddings=tied,
            rope=_rope_of(rope),
            fields=own_fields(hf),
        )
        config.check_builds()
        return config

    def check_builds(self) -> None:
        """Raises ValueError if transformers cannot build a layer."""
        try:
            self._linears  # noqa: B018
        except Exception as problem:  # many unrelated types
            raise ValueError(f"transformers cannot build this {self.family} decoder: {one_line(problem)}") from problem

    @classmethod
    def check(cls, hf: Any) -> None:
        """Raises ValueError for unsupported settings."""

    def to_hf(self) -> dict[str, Any]:
        own = {"vocab_size": self.vocab_size, "tie_word_embeddings": self.tie_embeddings}
        return self.fields | own

    def to_hf5(self) -> dict[str, Any]:
        return self.to_hf()


def _rope_of(parameters: dict[str, Any]) -> RopeConfig:
    """The RoPE settings that determine the context length. (transformers' model applies RoPE itself.)"""
    if parameters.get("rope_type", "default") == "default":
        return RopeConfig()
    if not isinstance(factor := parameters.get("factor"), (int, float)):
        raise ValueError("RoPE of type 'linear' needs factor")
    return RopeConfig("linear", factor=float(factor))


def _without_dropout(fields: dict[str, Any]) -> dict[str, Any]:
    """A copy, sections included."""
    made = copy.deepcopy(fields)
    for name, value in fields.items():
        if isinstance(value, dict):
            made[name] = _without_dropout(value)
        elif "drop" in name and isinstance(value, (int, float)):
            made[name] = type(value)()
    return made


def own_fields(hf: Any) -> dict[str, Any]:
    """The fields of a transformers config that not every config has."""
    from transformers import PretrainedConfig

    general = {*PretrainedConfig().to_dict(), "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "model_type"}

    def own(fields: dict[str, Any]) -> dict[str, Any]:
        kept = ((name, value) for name, value in fields.items() if name not in general)
        return {name: own(value) if isinstance(value, dict) else value for name, value in kept}

    return own(hf.to_dict())


@dataclass(frozen=True, kw_only=True)
class OptConfig(HostedConfig):
    """OPT (Zhang et al. 2022): learned positions, so longer prompts are impossible."""

    family = "opt"
    has_learned_positions = True
    embedding_name = "decoder.embed_tokens"
    layers_name = "decoder.layers"

    @classmethod
    def check(cls, hf: Any) -> None:
        if hf.word_embed_proj_dim != hf.hidden_size:
            raise ValueError(
                f"word_embed_proj_dim is {hf.word_embed_proj_dim}: rows of a projector have the hidden_size, "
                f"{hf.hidden_size}, so embeddings must have it too"
            )


@dataclass(frozen=True, kw_only=True)
class PhiConfig(HostedConfig):
    """Phi 1, 1.5 and 2 (Li et al. 2023): attention and MLP in parallel, rotary positions in a part of each head."""

    family = "phi"


@dataclass(frozen=True, kw_only=True)
class StableLmConfig(HostedConfig):
    """StableLM (Bellagente et al. 2024)."""

    family = "stablelm"


@dataclass(frozen=True)
class Rows:
    """Passed to transformers' layers as their mask: how rows group into sequences, and the cache."""

    spans: Spans
    cache: PagedCache | None


rows_of_pass: contextvars.ContextVar[Rows] = contextvars.ContextVar("rows")


class HostedDecoder(BaseDecoder):
    """A base model of transformers, and a head. The model's children are also this module's (one shared dict, so that
    replacing a child affects both), so that parameters have the same names; the model itself is not a child.
    """

    config: HostedConfig

    def __init__(self, config: HostedConfig) -> None:
        super().__init__()
        self.config = config
        model = _base_model(config)
        self._model = (model,)  # a tuple, so that it is not registered
        self.__dict__["_modules"] = model._modules
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __getattr__(self, name: str) -> Any:
        """`embed_tokens` and `layers`, if the model has other names for them."""
        if name in ("embed_tokens", "layers"):
            inside = self.config.embedding_name if name == "embed_tokens" else self.config.layers_name
            if inside != name:
                return self.get_submodule(inside)
        return super().__getattr__(name)

    @property
    def recompute(self) -> Recompute:
        return self._recompute

    @recompute.setter
    def recompute(self, how: Recompute) -> None:
        self._recompute = how
        layer: Any
        for layer in self.layers:
            layer.gradient_checkpointing = how != "none"
            layer._gradient_checkpointing_func = functools.partial(run_layer, how)

    def forward(self, x_RC: Tensor, position_R: Tensor, spans: Spans, cache: PagedCache | None = None) -> Tensor:
        if not len(x_RC):  # transformers' models do not support empty inputs, but sharded ones must run
            row = self(x_RC.new_zeros(1, x_RC.shape[1]), position_R.new_zeros(1), Spans((0,), (1,)))
            return x_RC + row[:0]
        if cache is not None:
            reserve(spans)
        token = rows_of_pass.set(Rows(spans, cache))
        try:
            out = self._model[0](inputs_embeds=x_RC[None], position_ids=position_R[None], use_cache=False)
        finally:
            rows_of_pass.reset(token)
        return out.last_hidden_state[0]


def _base_model(config: HostedConfig) -> nn.Module:
    """transformers' model without a head. Its buffers have their values even on the meta device, because no checkpoint
    stores them.
    """
    hf = config.hf_config()
    model = config.base_model(hf)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with torch.device("cpu"):
                model.set_submodule(name, type(module)(config=hf))
    return model


def _mask(*_: Any, **__: Any) -> Rows:
    return rows_of_pass.get()


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Rows,
    scaling: float | None = None,
    slopes: Tensor | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """Called by transformers in each layer: query [1, H, R, D], key and value [1, K, R, D] to [1, R, H, D]; `slopes` as
    for `attend`. Raises ValueError for options that it does not support.
    """
    if found := [name for name in _UNSERVED if extras.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(found)} is not supported, so this model cannot be hosted")
    size = query.shape[-1]
    if scaling is not None and scaling != size**-0.5:
        query = query * (scaling * size**0.5)
    query, key, value = (rows[0].transpose(0, 1) for rows in (query, key, value))
    out = attend(query, key, value, attention_mask.spans, module.layer_idx, attention_mask.cache, None, slopes)
    return out.view(1, len(query), -1, size), None
