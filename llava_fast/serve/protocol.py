"""OpenAI's request bodies: the fields that are served, their types and bounds. Any other field is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(max_length=4 << 20)]


class Body(BaseModel):
    """A part of a request. Fields that are not served are refused, unless they are null."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def _no_others(self) -> Body:
        others = [name for name, value in (self.model_extra or {}).items() if value is not None]
        if others:
            served = ", ".join(type(self).model_fields)
            raise ValueError(f"{others[0][:80]!r} is not supported by this server; it takes {served}")
        return self


class StreamOptions(Body):
    include_usage: bool = False


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "high"] = Field("auto", description="Images are tiled as the checkpoint says.")


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]


class Options(Body):
    """What both endpoints take."""

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1)] | None = Field(0, description="0 or -1: off.")
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(False, description="Go on past end tokens, for benchmarks.")
    user: Any = Field(None, description="Not read.")

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of an answer that the client asks for."""
        return self.max_tokens

    @model_validator(mode="after")
    def _stream_options(self) -> Options:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true")
        return self

    def sampling(self) -> dict[str, Any]:
        """The fields of `Sampling` that the body sets, the answer's length aside."""
        chosen = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": self.stop,
            "ignore_eos": self.ignore_eos,
        }
        defaults = {"temperature": 1.0}
        return defaults | {name: value for name, value in chosen.items() if value is not None}


class ChatRequest(Options):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
