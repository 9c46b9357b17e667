"""Kinds of parts by name: a tower, a connector or a decoder is one file in its folder and one line in its registry."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class Registry(Mapping[str, type[T]]):
    """name -> class, from {"name": "module:Class"}; `package` is where the modules are. Imported at first use.

    Looking up an unknown name raises KeyError; iterating yields the names.
    """

    def __init__(self, package: str, entries: Mapping[str, str]) -> None:
        self._package = package
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> type[T]:
        module, _, kind = self._entries[name].partition(":")
        return getattr(importlib.import_module(f"{self._package}.{module}"), kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def name_of(self, kind: type) -> str:
        """The name that a class is registered by."""
        return next(name for name in self if self._entries[name].endswith(f":{kind.__name__}") and self[name] is kind)
