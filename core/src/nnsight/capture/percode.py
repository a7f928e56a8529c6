"""A cache that belongs to code objects: by identity, never by file and line, and gone with the code."""

from __future__ import annotations

import weakref
from types import CodeType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerCode(Generic[T]):
    """Maps a code object and a key to a value for as long as the code object lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[CodeType], dict[Any, T]]] = {}

    def of(self, code: CodeType) -> dict[Any, T]:
        """Return the values kept for one code object, to be read and added to."""
        key = id(code)  # code objects compare by content: equal code from two files is not the same code
        entry = self._known.get(key)
        if entry is None or entry[0]() is not code:
            entry = self._known[key] = (weakref.ref(code, lambda _: self._known.pop(key, None)), {})
        return entry[1]
