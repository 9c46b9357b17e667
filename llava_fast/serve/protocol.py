"""OpenAI's request bodies: the supported fields, their types and limits. Any other field is rejected by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llava_fast.generation.grammar import Grammar

Text = Annotated[str, Field(max_length=4 << 20)]
Name = Annotated[str, Field(max_length=1024)]
Stop = Annotated[str, Field(max_length=256)]


SMALLEST_TEMPERATURE = 1e-6  # below it decoding is greedy: dividing logits by less overflows float32
SMALLEST_TOP_P = 1e-9  # replaces a top_p of 0: only the most likely token


class Body(BaseModel):
    """Base of all request objects. Unsupported fields are rejected unless they are null."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def _no_others(self) -> Body:
        others = [name for name, value in (self.model_extra or {}).items() if value is not None]
        if others:
            served = ", ".join(type(self).model_fields)
            raise ValueError(f"{others[0][:80]!r} is not supported by this server; it takes {served}")
        return self


MOST_SCHEMA = 256 << 10


class StreamOptions(Body):
    include_usage: bool = False


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "high"] | None = Field("auto", description="Images are tiled as the checkpoint says.")


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Body):
    url: str


class VideoPart(Body):
    type: Literal["video_url"]
    video_url: VideoUrl


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=1024)]


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class TextFormat(Body):
    type: Literal["text"]

    @property
    def grammar(self) -> Grammar | None:
        return None


class JsonFormat(Body):
    type: Literal["json_object"]

    @property
    def grammar(self) -> Grammar:
        return Grammar.json()


class JsonSchema(Body):
    model_config = ConfigDict(serialize_by_alias=True)

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] = Field({"type": "object"}, alias="schema")
    strict: bool | None = Field(None, description="A schema always holds.")

    @model_validator(mode="after")
    def _bounded(self) -> JsonSchema:
        if len(Grammar.json_schema(self.json_schema).text) > MOST_SCHEMA:
            raise ValueError(f"the schema has more than {MOST_SCHEMA} characters")
        return self


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema

    @property
    def grammar(self) -> Grammar:
        return Grammar.json_schema(self.json_schema.json_schema)


class RegexFormat(Body):
    type: Literal["regex"]
    regex: Annotated[str, Field(max_length=16384, description="Rust's syntax; the whole answer matches.")]

    @property
    def grammar(self) -> Grammar:
        return Grammar.regex(self.regex)


ResponseFormat = Annotated[TextFormat | JsonFormat | JsonSchemaFormat | RegexFormat, Field(discriminator="type")]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class Options(Body):
    """The fields of both endpoints."""

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(0, description="0 or -1: off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = 1.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    response_format: ResponseFormat | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(False, description="Go on past end tokens, for benchmarks.")
    user: str | None = Field(None, description="Not read.")

    @property
    def most_tokens(self) -> int | None:
        """The requested limit on generated tokens, or None for as many as fit into the context."""
        return self.max_tokens

    @property
    def top_tokens(self) -> int | None:
        """The number of most likely tokens to return at each position, or None for no log probabilities."""
        raise NotImplementedError

    @property
    def answers(self) -> int:
        """The number of requested answers."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _stream_options(self) -> Options:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true")
        return self

    def sampling(self) -> dict[str, Any]:
        """The fields of `Sampling` that the body sets, except the length limit."""
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        chosen = {
            "temperature": 0.0 if (self.temperature or 1) < SMALLEST_TEMPERATURE else self.temperature,
            "top_p": None if self.top_p is None else max(self.top_p, SMALLEST_TOP_P),
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": bias,
            "logprobs": self.top_tokens,
            "grammar": None if self.response_format is None else self.response_format.grammar,
            "seed": None if self.seed is None else self.seed % 2**62,
            "stop": self.stop,
            "ignore_eos": self.ignore_eos,
        }
        return {"temperature": 1.0} | {name: value for name, value in chosen.items() if value is not None}


class ChatRequest(Options):
    """The body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_tokens(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _top_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs=true")
        return self


class PlanRequest(Body):
    """The body of /v1/llava_fast/plan."""

    model: str
    messages: Messages


class CompletionRequest(Options):
    """The body of /v1/completions. The prompt is used without a chat template."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def answers(self) -> int:
        return (self.n or 1) * len(self.prompts)

    @property
    def top_tokens(self) -> int | None:
        return self.logprobs
