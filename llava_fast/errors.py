"""The errors a user of llava_fast can meet, each a sentence that names the thing and the remedy."""


class LlavaFastError(ValueError):
    """Base of every error this package raises on purpose; a ValueError, so callers may catch either."""


class ImageError(LlavaFastError):
    """An image or video that cannot be read: truncated, empty, too large, or of an unknown kind."""


class MissingFileError(ImageError, FileNotFoundError):
    """An image or video file that is not there."""


class RequestError(LlavaFastError):
    """A request that cannot be served: marks and images disagree, the prompt is too long, a bad option."""


class CheckpointError(LlavaFastError):
    """A checkpoint that cannot be loaded or saved: missing shard, wrong shape, unknown model type."""
