"""What a block does to what it found outside of itself: lists it fills, attributes it sets, tensors it edits.

The runner notes everything that the block's variables hold before it is run, each by a path from a variable, and finds
afterwards what has changed. `changed` does the same at the caller's end.
"""

from __future__ import annotations

import collections
import hashlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nnsight import Envoy, payload
from nnsight_ndif.values import PLAIN
from nnsight_ndif.wire import Special

#: A step to what a value holds: `("item", index)`, `("nth", index)` of a dict's values, or `("attr", name)`.
Step = tuple[str, Any]


def is_open(value: Any) -> bool:
    """Return whether a value can hold others that a block may have changed, or can be changed itself."""
    kind = type(value)
    if kind in (list, tuple, dict, set, collections.deque, bytearray) or isinstance(value, torch.Tensor):
        return True
    return is_array(value) or (not isinstance(value, Envoy | type) and payload.can_take(kind))


def is_array(value: Any) -> bool:
    """Return whether a value is an array of numpy's."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray


def held_by(value: Any) -> Iterator[tuple[Step, Any]]:
    """Yield what a value holds, and how it is reached."""
    if type(value) in (list, tuple, collections.deque):
        for index, item in enumerate(value):
            yield ("item", index), item
        return
    if isinstance(value, dict):
        for index, item in enumerate(dict.values(value)):
            yield ("nth", index), item
    if not isinstance(value, torch.Tensor) and not is_array(value):
        for name, item in payload.attributes(value):
            yield ("attr", name), item


class Watch:
    """Finds what a block has changed.

    Args:
        outside: what it finds; nothing has happened to it yet.
        is_models: returns whether an object belongs to the model.
        is_exposed: returns whether a tensor's memory was reached around torch.
    """

    def __init__(
        self, outside: payload.Outside, is_models: Callable[[Any], bool], is_exposed: Callable[[torch.Tensor], bool]
    ) -> None:
        self._outside = outside
        self._is_models = is_models
        self._is_exposed = is_exposed
        self._paths: list[list[Any]] = []
        self._told: set[int] = set()
        self._numbers: dict[int, tuple[int, Any]] = {}
        self._before: list[tuple[int, Any, Any]] = []
        self._variables = dict(outside.variables())
        for key, value in self._variables.items():
            self._walk(value, key, ())

    def _walk(self, value: Any, key: tuple[Any, ...], steps: tuple[Step, ...]) -> None:
        if type(value) in PLAIN or id(value) in self._numbers or self._is_models(value):
            return
        number = len(self._paths)
        self._numbers[id(value)] = number, value
        self._paths.append([list(key), [list(step) for step in steps]])
        if is_open(value):
            self._before.append((number, value, content(value)))
            for step, item in held_by(value):
                self._walk(item, key, (*steps, step))

    def given(self, value: Any) -> Special | None:
        """Return the data that stands for an object that was there before the block, None for another one."""
        known = self._numbers.get(id(value))
        if known is None:
            return None
        self._told.add(known[0])
        return Special("outside", known[0])

    def paths(self) -> dict[int, list[Any]]:
        """Return where each object was found that something was told of."""
        return {number: self._paths[number] for number in self._told}

    def changes(self) -> Iterator[tuple[Any, ...]]:
        """Yield what has changed: the number of an object or the name of a variable, how, and its new content."""
        for number, value, before in self._before:
            for change in _changed(value, before, self._is_exposed(value)):
                self._told.add(number)
                yield number, *change
        for key, value in self._outside.variables():
            before = self._variables.get(key, self)
            if self._outside.is_shared(key) and before is not self and not is_same(value, before):
                yield key, "bound", value


def content(value: Any) -> Any:
    """Return what tells later whether a value was changed."""
    if isinstance(value, torch.Tensor):
        return None if value.is_inference() else value._version
    if is_array(value):
        return hashlib.blake2b(value.tobytes(), digest_size=16).digest() if value.dtype != object else list(value.flat)
    if type(value) in (list, tuple, collections.deque):
        return list(value)
    if type(value) is set:
        return set(value)
    if type(value) is bytearray:
        return bytes(value)
    pairs = list(dict.items(value)) if isinstance(value, dict) else None
    return pairs, dict(payload.attributes(value))


def is_same(value: Any, before: Any) -> bool:
    """Return whether one value is the other, or equal plain data."""
    if value is before:
        return True
    return type(value) is type(before) and type(value) in PLAIN and (value == before or value != value != before)


def _changed(value: Any, before: Any, is_exposed: bool) -> Iterator[tuple[Any, ...]]:
    """Yield the changes of one object."""
    if isinstance(value, torch.Tensor):
        if (not value.is_inference() and value._version != before) or is_exposed:
            yield "data", value.detach().clone()
        if value.is_leaf and value.grad is not None:
            yield "grad", value.grad.detach().clone()
        return
    now = content(value)
    if is_array(value) or type(value) in (bytearray, set):
        if now != before:
            yield ("items", list(value)) if type(value) is set else ("data", value.copy())
    elif type(value) in (list, tuple, collections.deque):
        if len(now) != len(before) or not all(map(is_same, now, before)):
            yield "items", now
    else:
        yield from _changed_instance(now, before)


def _changed_instance(now: Any, before: Any) -> Iterator[tuple[Any, ...]]:
    (pairs, fields), (old_pairs, old_fields) = now, before
    if pairs is not None:
        is_whole = len(pairs) == len(old_pairs) and all(
            one[0] is two[0] and is_same(one[1], two[1]) for one, two in zip(pairs, old_pairs, strict=True)
        )
        if not is_whole:
            yield "pairs", pairs
    missing = object()
    new = {name: item for name, item in fields.items() if not is_same(item, old_fields.get(name, missing))}
    gone = [name for name in old_fields if name not in fields]
    if new or gone:
        yield "fields", new, gone
