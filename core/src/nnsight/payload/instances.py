"""Instances as what they are made of: which can be taken apart and made again of their attributes and items."""

from __future__ import annotations

import collections
import dataclasses
import sys
import types
from collections.abc import Iterable
from typing import Any

import torch


def kind_name(kind: type) -> str:
    """Return what messages call a type."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def is_named(kind: type) -> bool:
    """Return whether a class is one of tuples whose items have names, such as what `torch.max` returns."""
    is_torch = kind.__module__ == "torch.return_types"
    return issubclass(kind, tuple) and (hasattr(kind, "_fields") or is_torch)


def is_scalar(value: Any) -> bool:
    """Return whether a value is a number of numpy's."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)


def can_take(kind: type) -> bool:
    """Return whether an instance of a class is what its attributes (and items, for a dict) are, and nothing more."""
    if kind in _TAKEN:
        return True
    base = next(base for base in kind.__mro__ if not base.__flags__ & _IS_HEAP)
    if base not in (object, dict, collections.OrderedDict) or hasattr(kind, "__del__"):
        return False
    if dataclasses.is_dataclass(kind) or issubclass(kind, collections.UserDict):
        return True
    ways = (("__reduce_ex__", _USUAL_EX), ("__reduce__", _USUAL_REDUCE), ("__getstate__", _USUAL_STATE))
    return all(getattr(kind, name) in usual for name, usual in ways)


def is_takeable(value: Any) -> bool:
    """Return whether an instance can be made again of its attributes and items."""
    kind = type(value)
    if not can_take(kind):
        return False
    if kind not in _TAKEN and not dataclasses.is_dataclass(kind) and not issubclass(kind, collections.UserDict):
        try:
            object.__reduce_ex__(value, 2)  # which knows whether there is anything in it that only C code sees
        except TypeError:
            return False
    return not any(name.startswith("__") and name.endswith("__") for name, _ in attributes(value))


def attributes(value: Any) -> Iterable[tuple[str, Any]]:
    """Yield the attributes that an instance has itself, those in slots included."""
    for name, item in getattr(value, "__dict__", {}).items():
        if name != "_compiled_call_impl" or not isinstance(value, torch.nn.Module):  # compiled code stays where it is
            yield name, item
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            stored = f"_{kind.__name__.lstrip('_')}{name}" if name[:2] == "__" != name[-2:] else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, stored):
                yield stored, getattr(value, stored)


def uncompiled(value: Any) -> Any:
    """Return the function or module that `torch.compile` was given, where a value is what that has made of it."""
    fields = getattr(value, "__dict__", None) if callable(value) else None
    if type(fields) is not dict or not ("_torchdynamo_orig_callable" in fields or "dynamo_ctx" in fields):
        return value
    module = fields.get("_modules", {}).get("_orig_mod")
    return fields.get("_torchdynamo_orig_callable", value) if module is None else module


def put_attribute(value: Any, name: str, item: Any) -> None:
    """Give an instance an attribute that it has itself. Nothing that its class defines is called.

    Raises:
        AttributeError: it can have none of this name.
    """
    slot = next((kind.__dict__[name] for kind in type(value).__mro__ if name in kind.__dict__), None)
    if isinstance(slot, types.MemberDescriptorType):
        slot.__set__(value, item)
    elif hasattr(value, "__dict__"):
        vars(value)[name] = item  # `object.__setattr__` would call the setter of a property
    else:
        raise AttributeError(f"it can have no attribute {name!r}")


_IS_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code defines
# How objects let themselves be taken apart where their class has nothing to say about it.
_USUAL_EX: tuple[Any, ...] = (object.__reduce_ex__,)
_USUAL_REDUCE: tuple[Any, ...] = (object.__reduce__, collections.OrderedDict.__reduce__)
_USUAL_STATE: tuple[Any, ...] = (object.__getstate__, getattr(torch.nn.Module, "__getstate__", None))
_TAKEN = (types.SimpleNamespace, collections.OrderedDict, collections.Counter)
