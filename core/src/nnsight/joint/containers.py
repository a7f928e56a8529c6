"""Looking into containers: applying a function to the tensors in a value, and putting new ones in their place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

Transform = Callable[[Any], Any]
_special: list[tuple[type, Callable[[Any, Transform], Any]]] = []


def register_container(kind: type, transform: Callable[[Any, Transform], Any]) -> None:
    """Teach batches to look into a container type.

    Args:
        kind: the type, subclasses included.
        transform: called with a container and a function of one value; returns a container of the same kind with the
            function applied to each value, leaving the given one as it is.
    """
    _special.insert(0, (kind, transform))


def transform(value: Any, function: Transform, is_shallow: bool = False) -> Any:
    """Return a value with `function` applied to everything in it that is no container; the value stays as it is.

    Args:
        value: a tensor, or containers of any depth.
        function: called with everything that is no container.
        is_shallow: leave containers that were registered as they are.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    for kind, look_into in _special:
        if isinstance(value, kind):
            return value if is_shallow else look_into(value, lambda inner: transform(inner, function))
    if isinstance(value, tuple | list):
        return rebuild_sequence(value, [transform(item, function, is_shallow) for item in value])
    if isinstance(value, dict):
        return with_items(value, {key: transform(item, function, is_shallow) for key, item in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return with_fields(value, {k: transform(item, function, is_shallow) for k, item in fields_of(value).items()})
    return function(value)


def is_registered(value: Any) -> bool:
    """Return whether a value is of a container type that was registered."""
    return any(isinstance(value, kind) for kind, _ in _special)


def snapshot(value: Any) -> Any:
    """Return the containers of a value as they are now, with the same things in them; None for a lone tensor."""
    if isinstance(value, torch.Tensor):
        return None
    return transform(value, lambda leaf: leaf, is_shallow=True)


def rebuild_sequence(old: Any, items: list[Any]) -> Any:
    """Return a tuple or list of the kind of an old one, named ones included."""
    return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)


def with_items(value: Any, items: dict[Any, Any]) -> Any:
    """Return a copy of a dict with other values in it."""
    new = copy.copy(value)
    for key, item in items.items():
        new[key] = item
    return new


def fields_of(value: Any) -> dict[str, Any]:
    """Return what is in a dataclass."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def with_fields(value: Any, fields: dict[str, Any]) -> Any:
    """Return a copy of a dataclass with other values in it, a frozen one included."""
    new = copy.copy(value)
    for name, item in fields.items():
        object.__setattr__(new, name, item)
    return new
