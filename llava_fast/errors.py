"""The errors that llava_fast raises; each message names the problem and the remedy."""


class LlavaFastError(ValueError):
    """Base class of the errors that this package raises on purpose; a ValueError, so callers may catch either."""


class ImageError(LlavaFastError):
    """An image or video that cannot be read: truncated, empty, too large, or of an unknown kind."""


class MissingPackageError(LlavaFastError, ImportError):
    """An optional package that is not installed; the message names the extra that installs it."""

    def __init__(self, what: str, package: str, extra: str, otherwise: str = "") -> None:
        super().__init__(f"{what} needs {package}: pip install 'llava_fast[{extra}]'{otherwise}")


class MissingFileError(ImageError, FileNotFoundError):
    """An image or video file that does not exist."""


class RequestError(LlavaFastError):
    """An invalid request: placeholders and images that do not match, a prompt that is too long, a bad option."""


class PromptTooLongError(RequestError):
    """A prompt with more tokens than the context, or a server, allows."""


class GenerationError(LlavaFastError):
    """An answer that cannot continue: the model's logits are NaN."""


class CacheFullError(LlavaFastError):
    """The KV cache has no free block and may not grow."""


class CheckpointError(LlavaFastError):
    """A checkpoint that cannot be loaded or saved: missing shard, wrong shape, unknown model type."""


class QuantisationError(LlavaFastError):
    """An invalid quantisation or quantised weight: an unknown scheme, a group that does not divide, a bad scale, a
    truncated tensor.
    """


class DataError(LlavaFastError):
    """Training data that cannot be used: a file that is not JSON, turns out of order, placeholders without images.
    `kind` classifies the problem, for reports.
    """

    def __init__(self, message: str, kind: str = "malformed") -> None:
        super().__init__(message)
        self.kind = kind


class RecipeError(LlavaFastError):
    """An invalid training recipe: an unknown field, a bad value, incompatible settings."""


class BackendError(LlavaFastError):
    """A backend requested by name that does not support this op or this call."""


class UnsupportedModelError(LlavaFastError):
    """A model that `accelerate` does not support."""


class PixelError(LlavaFastError):
    """uint8 pixels that an accelerated model cannot accept."""


class PlanError(LlavaFastError):
    """A collator's plan (`llava_plan_*`) that does not belong to its batch."""


class TrainingError(LlavaFastError):
    """A training run that must stop: its loss is not finite or spikes, or its checkpoint does not match it."""


class ServeError(LlavaFastError):
    """A server that cannot be started: an option out of range, an unreadable key file."""


class EndpointError(LlavaFastError):
    """A chat endpoint that cannot be asked: a wrong key or model, no quota, no connection, a spent budget, replies that
    cannot be kept.
    """


class EvaluationError(LlavaFastError):
    """An evaluation that cannot run: an unknown task, a file or field of its data that is missing, answers of another
    model in its folder.
    """


class BatchError(LlavaFastError):
    """A batch that cannot be run as asked: an input without rows, a missing column, an output of another batch."""
