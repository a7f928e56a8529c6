"""A cache that belongs to code objects: by identity, never by file and line, and gone with the code."""

from __future__ import annotations

import weakref
from types import CodeType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerCode(Generic[T]):
    """Maps a code object and a key to a value for as long as the code object lives; the value must not refer to it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[CodeType], dict[Any, T]]] = {}

    def of(self, code: CodeType) -> dict[Any, T]:
        """Return the values kept for one code object, to be read and added to."""
        key = id(code)  # code objects compare by content: equal code from two files is not the same code
        entry = self._known.get(key)
        if entry is None or entry[0]() is not code:
            known = self._known

            def forget(reference: weakref.ref[CodeType]) -> None:
                if key in known and known[key][0] is reference:  # the place may be another code object's by now
                    del known[key]

            entry = known[key] = (weakref.ref(code, forget), {})
        return entry[1]
