"""`save`: mark what must come back from wherever a block runs.

A local block runs in the caller's frame, where everything it binds stays, so there a mark does nothing. `x.save()` is
made available on tensors, on Python's scalars and containers and on the types that plugins name, by a descriptor that
exists only while a block is open in the calling code: anywhere else `hasattr(x, "save")` is False.
"""

from __future__ import annotations

import ctypes
import functools
import gc
from typing import Any, TypeVar

import torch

from nnsight.config import CONFIG
from nnsight.errors import SaveError
from nnsight.kernel.blocks import innermost
from nnsight.plugins import hooks

T = TypeVar("T")

_SCALARS_AND_CONTAINERS = (
    int, float, complex, str, bytes, bytearray, type(None), list, tuple, dict, set, frozenset, slice, range,
)  # fmt: skip
_mounted: set[type] = set()


def save(value: T) -> T:
    """Mark a value as one that must come back from wherever the block runs, and return it.

    Args:
        value: anything. Locally nothing needs saving: every variable that the block binds is there afterwards.

    Raises:
        SaveError: no block is open here.
    """
    mediator = innermost()
    if mediator is None:
        raise SaveError(
            "save() was called outside of a trace: there is no block here whose value could be kept. Call it inside "
            "`with model.trace(...):`; outside of one a variable keeps its value anyway."
        )
    mediator.save(value)
    return value


class _Save:
    """The `save` attribute of a type that is not ours."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        of_class = instance is None and owner is not type(None)  # None itself is an instance too
        if of_class and owner is not None and issubclass(owner, torch.Tensor):
            return save  # torch looks at every name in `dir(torch.Tensor)`, and takes what is there to be callable
        if of_class or innermost() is None or not CONFIG.APP.PYMOUNT:
            name = (owner or type(instance)).__name__
            where = "outside of a trace: variables keep their values there"
            if not CONFIG.APP.PYMOUNT:
                where = "(CONFIG.APP.PYMOUNT is off): use nnsight.save(x)"
            raise AttributeError(f"{name!r} object has no attribute 'save' {where}", name="save", obj=instance)
        return functools.partial(save, instance)


def mount() -> None:
    """Give tensors, Python's own types and those that plugins name their `save`, once."""
    every: list[type] = [torch.Tensor, *_SCALARS_AND_CONTAINERS, *hooks.saveable_types()]
    for cls in every:
        if cls in _mounted:
            continue
        _mounted.add(cls)
        if "save" not in cls.__dict__:
            _set_attribute(cls, "save", _Save())


def _set_attribute(cls: type, name: str, value: object) -> None:
    try:
        setattr(cls, name, value)
    except TypeError:
        # A type implemented in C: its real dict is what the mappingproxy refers to.
        namespace = gc.get_referents(cls.__dict__)[0]
        namespace[name] = value
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(cls))
