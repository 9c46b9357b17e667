"""The versions of transformers that the tests were run with."""

from __future__ import annotations

import functools

from llava_fast.accelerated.replacement import logger

TRIED = ("5.17", "5.24")
"""The first and the last minor version of transformers that was tried, both included. pyproject.toml says the same: the
first as the requirement, the last in the extra `tried`."""


@functools.cache
def warn_if_untried() -> None:
    """Name an untried version of transformers in the log `llava_fast.integrations`, once a process."""
    import transformers

    first, last = map(_numbers, TRIED)
    if not first <= current() <= last:
        logger.warning(
            "transformers %s is untried: llava_fast was tested with %s to %s. What differs from those takes the stock "
            "path; pip install 'llava_fast[tried]' brings a tested version",
            transformers.__version__,
            *TRIED,
        )


def current() -> tuple[int, int]:
    """(major, minor) of the transformers that is installed."""
    import transformers

    return _numbers(transformers.__version__)


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
