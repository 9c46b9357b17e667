"""The versions of transformers with which the tests were run."""

from __future__ import annotations

import functools

from llava_fast.accelerated.replacement import logger

TRIED = ("5.17", "5.24")
"""The first and last tested minor versions of transformers, inclusive. pyproject.toml must agree: the first is the
requirement, the last is in the extra `tried`."""


@functools.cache
def warn_if_untried() -> None:
    """Log an untested version of transformers in `llava_fast.integrations`, once per process."""
    import transformers

    first, last = map(_numbers, TRIED)
    if not first <= current() <= last:
        logger.warning(
            "transformers %s is untested: llava_fast was tested with %s to %s. Methods that differ take the stock "
            "path; pip install 'llava_fast[tried]' installs a tested version",
            transformers.__version__,
            *TRIED,
        )


def current() -> tuple[int, int]:
    """(major, minor) of the installed transformers."""
    import transformers

    return _numbers(transformers.__version__)


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
