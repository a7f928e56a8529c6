"""The caller's end of `outside`: what a block has changed there is changed here.

What may be changed lies on a path from a variable of the block, through containers and instances. No code of any class
is called.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch

from nnsight import payload
from nnsight_ndif.errors import FrameError
from nnsight_ndif.outside import held_by, is_array, is_open
from nnsight_ndif.values import same_bytes

_WRONG = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError)


class Changed:
    """Brings changes in place.

    Args:
        outside: what the block found outside of itself.
        paths: where the runner found each object of the caller's.
        root: the model.
    """

    def __init__(self, outside: payload.Outside, paths: dict[Any, Any], root: Any) -> None:
        self._outside = outside
        self._paths = paths
        self._models = {id(envoy._module) for envoy in (root, *root._envoys.values())}

    def find(self, number: Any) -> Any:
        """Return the object of the caller's that the runner gave a number to.

        Raises:
            FrameError: there is none.
        """
        try:
            return self._walk(number)[0]
        except _WRONG as error:
            raise FrameError(f"the result of a block names what is not there: {error}") from None

    def _walk(self, number: Any) -> tuple[Any, str]:
        """Return an object, and what a message calls it."""
        key, steps = self._paths[number]
        value = self._outside.get(key)
        told = str(key[-1]) if key[0] != "cell" else "a variable that functions share"
        for kind, where in steps:
            if not is_open(value) or id(value) in self._models:
                raise LookupError("a path leads through what a block cannot change")
            named = where if kind != "nth" else list(dict.keys(value))[where]
            told += f".{named}" if kind == "attr" else f"[{named!r}]"
            value = dict(held_by(value))[kind, where]
        if id(value) in self._models:
            raise LookupError("a path leads to the model")
        return value, told

    def prepare(self, changes: list[Any]) -> list[Callable[[], None]]:
        """Return what brings changes in place, all of it checked.

        Raises:
            FrameError: a change is malformed.
        """
        todo: list[Callable[[], None]] = []
        try:
            for place, kind, *parts in changes:
                if kind == "bound":
                    (value,) = parts
                    todo.append(_binding(self._outside, place, value))
                else:
                    value = self._walk(place)[0]
                    if not is_open(value):
                        raise TypeError("a change is of what cannot be changed")
                    todo.append(_PREPARE[kind](value, *parts))
        except _WRONG as error:
            raise FrameError(f"what a block has changed is malformed: {error}") from None
        return todo

    def named(self, lost: list[Any]) -> list[tuple[str, str]]:
        """Return what was changed and cannot come back: what messages call it, and why it cannot.

        Raises:
            FrameError: it is malformed.
        """
        try:
            return [
                (self._walk(place)[1] if type(place) is int else str(place[-1]), str(reason)[:1000])
                for place, reason in lost
            ]
        except _WRONG as error:
            raise FrameError(f"what a block has changed is malformed: {error}") from None


def set_field(value: Any, name: Any, item: Any) -> None:
    """Set an attribute of an instance without calling anything of its class."""
    if type(name) is not str or (name.startswith("__") and name.endswith("__")):
        raise TypeError(f"an attribute cannot be called {name!r}")
    if hasattr(value, "__dict__"):
        vars(value)[name] = item
    else:
        object.__setattr__(value, name, item)


def _binding(outside: payload.Outside, key: Any, value: Any) -> Callable[[], None]:
    outside.get(key)
    if not outside.is_shared(tuple(key)):
        raise LookupError("a variable is the block's own")
    return lambda: outside.bind(key, value)


def _items(value: Any, items: Any) -> Callable[[], None]:
    if type(value) not in (list, set, collections.deque) or type(items) is not list:
        raise TypeError("a change of items is of no list")

    def change() -> None:
        value.clear()
        (value.update if type(value) is set else value.extend)(items)

    return change


def _pairs(value: Any, pairs: Any) -> Callable[[], None]:
    if not isinstance(value, dict) or type(pairs) is not list or not all(len(pair) == 2 for pair in pairs):
        raise TypeError("a change of keys is of no dict")
    base: Any = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict

    def change() -> None:
        base.clear(value)
        for key, item in pairs:
            base.__setitem__(value, key, item)

    return change


def _fields(value: Any, new: Any, gone: Any) -> Callable[[], None]:
    if type(new) is not dict or type(gone) is not list:
        raise TypeError("a change of attributes is none")
    if isinstance(value, torch.Tensor | list | tuple | set | collections.deque | bytearray) or is_array(value):
        raise TypeError("a change of attributes is of what has none")

    def change() -> None:
        for name, item in new.items():
            set_field(value, name, item)
        for name in gone:
            vars(value).pop(name, None)

    return change


def _data(value: Any, new: Any) -> Callable[[], None]:
    if type(value) is bytearray:
        if type(new) is not bytearray:
            raise TypeError("a change of bytes is none")
        return lambda: value.__setitem__(slice(None), new)
    if isinstance(value, torch.Tensor):
        if not isinstance(new, torch.Tensor) or new.shape != value.shape or new.dtype != value.dtype:
            raise TypeError("a change of a tensor has another shape or dtype")
        return lambda: _copy(value, new)
    if not is_array(value) or not is_array(new) or new.shape != value.shape or new.dtype != value.dtype:
        raise TypeError("a change of an array has another shape or dtype")
    return lambda: value.__setitem__(..., new)


def _copy(value: torch.Tensor, new: torch.Tensor) -> None:
    if same_bytes(value.detach().cpu(), new):
        return  # it may only have been looked at with other eyes than torch's: its count of edits stays
    with torch.no_grad():
        value.copy_(new)


def _grad(value: Any, new: Any) -> Callable[[], None]:
    if not isinstance(value, torch.Tensor) or not value.is_leaf or not value.requires_grad:
        raise TypeError("a gradient is of what can have none")
    if not isinstance(new, torch.Tensor) or new.shape != value.shape or new.dtype != value.dtype:
        raise TypeError("a gradient has another shape or dtype than what it is of")

    def change() -> None:
        given = new.to(value.device)
        value.grad = given if value.grad is None else value.grad + given

    return change


_PREPARE: dict[str, Callable[..., Callable[[], None]]] = {
    "items": _items, "pairs": _pairs, "fields": _fields, "data": _data, "grad": _grad,
}  # fmt: skip
