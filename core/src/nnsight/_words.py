"""Words for messages: what a value is, how it was changed, which name may have been meant."""

from __future__ import annotations

import difflib
import inspect
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from nnsight.errors import NotInTreeError

CHANGED, SKIPPED = "changed", "skipped"


def describe(value: Any) -> str:
    """Return a value in few words: type and shape of tensors, and what holds them."""
    if hasattr(value, "dtype") and (shape := shape_of(value)) is not None:
        return f"{str(value.dtype).removeprefix('torch.')}{list(shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {describe(item)}' for key, item in value.items())}}}"
    return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__


def change(was: Any, value: Any) -> str:
    """Return what happened to a value that another one replaced: where they differ in shape or type, how."""
    told = " and ".join(f"from {describe(one)} to {describe(other)}" for one, other in _differing(was, value))
    return f"{CHANGED} {told}" if told else CHANGED


def skip(value: Any) -> str:
    """Return what happened to a module that a value stands in for."""
    return f"{SKIPPED} with {describe(value)}"


def nearest(name: str, names: Iterable[Any]) -> str:
    """Return ` Nearest: ...` with the names closest to a misspelt one, or nothing."""
    near = difflib.get_close_matches(name, sorted({str(one) for one in names}), n=3)
    return f" Nearest: {', '.join(near)}." if near else ""


def refuse_slip(path: str, kind: type, name: str) -> None:
    """Refuse to assign, to a part of a model in a block, what is nearly called as a location: nobody would ever see it.

    Args:
        path: of the part.
        kind: its class, whose properties are its locations.
        name: what is assigned to.

    Raises:
        NotInTreeError: it is a slip.
    """
    locations = [one for one in dir(kind) if hasattr(inspect.getattr_static(kind, one), "__set__")]
    near = difflib.get_close_matches(name, locations, n=2, cutoff=0.8)
    if near:
        raise NotInTreeError(
            f"`{path}` has no {name!r} to assign to. Nearest: {', '.join(near)}. For an attribute of your own, choose "
            "another name, or set it before the block."
        )


class Misspelt:
    """A message that ends with the names nearest to one that is not there; looked for when it is read, which few are.

    Args:
        text: the message.
        name: what was asked for.
        owner: what has the names.
    """

    def __init__(self, text: str, name: str, owner: object) -> None:
        self._text = text
        self._name = name
        self._owner = weakref.ref(owner)

    def __str__(self) -> str:
        owner = self._owner()
        if owner is not None:
            names = (name for name in dir(owner) if self._name.startswith("_") or not name.startswith("_"))
            self._text += nearest(self._name, names)
            self._owner = lambda: None  # type: ignore[assignment]
        return self._text

    def __repr__(self) -> str:
        return repr(str(self))

    def __reduce__(self) -> Any:
        return str, (str(self),)


def shape_of(value: Any) -> Any:
    """Return the shape of a tensor or array; None for what has none."""
    try:
        return value.shape
    except (AttributeError, RuntimeError):  # nested tensors raise the second
        return None


def _differing(was: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parts that differ, with what was in their place; what holds others is one part where it has changed."""
    shapes = shape_of(was), shape_of(value)
    if None not in shapes:
        if shapes[0] != shapes[1]:
            yield was, value
    elif type(was) is not type(value):
        yield was, value
    elif isinstance(was, tuple | list):
        if len(was) == len(value):
            for one, other in zip(was, value, strict=True):
                yield from _differing(one, other)
        else:
            yield was, value
    elif isinstance(was, dict):
        if was.keys() == value.keys():
            for key, one in was.items():
                yield from _differing(one, value[key])
        else:
            yield was, value
