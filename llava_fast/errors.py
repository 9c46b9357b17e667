"""The errors a user of llava_fast can meet, each a sentence that names the thing and the remedy."""


class LlavaFastError(ValueError):
    """Base of every error this package raises on purpose; a ValueError, so callers may catch either."""


class ImageError(LlavaFastError):
    """An image or video that cannot be read: truncated, empty, too large, or of an unknown kind."""


class MissingPackageError(LlavaFastError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""

    def __init__(self, what: str, package: str, extra: str, otherwise: str = "") -> None:
        super().__init__(f"{what} needs {package}: pip install 'llava_fast[{extra}]'{otherwise}")


class MissingFileError(ImageError, FileNotFoundError):
    """An image or video file that is not there."""


class RequestError(LlavaFastError):
    """A request that cannot be served: placeholders and images disagree, the prompt is too long, a bad option."""


class GenerationError(LlavaFastError):
    """An answer that breaks off: the model's logits are not numbers."""


class CacheFullError(LlavaFastError):
    """No block of the KV cache is free and it may not grow."""


class CheckpointError(LlavaFastError):
    """A checkpoint that cannot be loaded or saved: missing shard, wrong shape, unknown model type."""


class QuantisationError(LlavaFastError):
    """A quantised weight that is not one: unknown scheme, a group that does not divide, a bad scale, a short tensor."""


class DataError(LlavaFastError):
    """Training data that cannot be used: a file that is no JSON, turns out of order, placeholders without images.

    `kind` sorts what is wrong, for reports."""

    def __init__(self, message: str, kind: str = "malformed") -> None:
        super().__init__(message)
        self.kind = kind


class RecipeError(LlavaFastError):
    """A training recipe that cannot be run: an unknown field, a bad value, parts that do not go together."""


class BackendError(LlavaFastError):
    """A backend that was asked for by name and cannot serve this op or this call."""


class UnsupportedModelError(LlavaFastError):
    """A model that `accelerate` does not serve."""


class PixelError(LlavaFastError):
    """uint8 pixels that an accelerated model cannot take."""


class PlanError(LlavaFastError):
    """A collator's plan (`llava_plan_*`) that does not belong to the batch it came with."""


class TrainingError(LlavaFastError):
    """A training run that must stop: its loss is not finite or has jumped, or its checkpoint does not fit it."""


class ServeError(LlavaFastError):
    """A server that cannot be started as asked: an option out of range, a key file that cannot be read."""
