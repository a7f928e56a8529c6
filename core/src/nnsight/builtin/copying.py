"""Copies of values: what a cache keeps must not change when the model or a block goes on to edit the original."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from nnsight.joint.containers import is_registered, rebuild_sequence, transform, with_items
from nnsight.kernel.envoy import Envoy

Copier = Callable[[Any], Any]
#: `id` of an original -> itself, for another might get its `id` when it is gone, and its copy.
Memo = dict[int, tuple[Any, Any]]
_SHARED = (nn.Module, Envoy, super, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def make_copier(device: torch.device | None, dtype: torch.dtype | None, is_detached: bool) -> Copier:
    """Return a function that copies a value: its tensors, and whatever holds them.

    Args:
        device: where the copies are; None for where the originals are.
        dtype: what floating-point tensors are cast to; None for what they are.
        is_detached: whether the copies are cut off from the graph.
    """
    on_cpu = device is not None and device.type == "cpu"

    def copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
        if is_detached and tensor.requires_grad:
            tensor = tensor.detach()
        is_there = tensor.is_cpu if on_cpu else (device is None or tensor.device == device)
        if is_there and (dtype is None or tensor.dtype == dtype):
            return tensor.clone()
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(device if device is not None else tensor.device, kind, copy=True)

    def copy_value(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return copy_tensor(value)
        if type(value) is tuple and len(value) == 2 and type(value[0]) is tuple and not value[1]:
            args, kwargs = value  # what most modules are called with: one tensor
            if len(args) == 1 and type(kwargs) is dict and isinstance(args[0], torch.Tensor):
                return (copy_tensor(args[0]),), {}
        return _copy(value, copy_tensor, {})

    return copy_value


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a value with a function applied to each tensor in it; what holds no tensor stays the object it is."""
    return _copy(value, function, {})


def _copy(value: Any, copy_tensor: Callable[[torch.Tensor], torch.Tensor], memo: Memo) -> Any:
    """Copy a value; what occurs twice in it is copied once, and what holds no tensor stays the object it is."""
    new: Any
    known = memo.get(id(value))
    if known is not None:
        return known[1]
    if isinstance(value, torch.Tensor):
        new = copy_tensor(value)
    elif isinstance(value, _PLAIN):
        return value
    elif isinstance(value, tuple | list):
        new = rebuild_sequence(value, [_copy(item, copy_tensor, memo) for item in value])
    elif isinstance(value, dict):
        new = with_items(value, {key: _copy(item, copy_tensor, memo) for key, item in value.items()})
    elif isinstance(value, _SHARED) or not (dataclasses.is_dataclass(value) or hasattr(value, "__dict__")):
        return value
    else:
        return _copy_object(value, copy_tensor, memo)
    memo[id(value)] = value, new
    return new


def _copy_object(value: Any, copy_tensor: Callable[[torch.Tensor], torch.Tensor], memo: Memo) -> Any:
    """Copy an object if there are tensors in it, such as the keys and values that a language model keeps."""
    given = value
    if is_registered(value):  # what it holds nothing of yet may be filled before the copy is looked at
        value = transform(value, lambda leaf: leaf)
    memo[id(given)] = given, value
    if hasattr(value, "__dict__"):
        attributes = dict(value.__dict__)
    else:
        attributes = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if not any(_holds_tensor(item) for item in attributes.values()):
        return value
    new = copy.copy(value)
    memo[id(given)] = given, new
    for name, item in attributes.items():
        object.__setattr__(new, name, _copy(item, copy_tensor, memo))
    return new


def _holds_tensor(value: Any, depth: int = 6) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0 or isinstance(value, (*_PLAIN, *_SHARED)):
        return False
    if isinstance(value, dict):
        return any(_holds_tensor(item, depth - 1) for item in value.values())
    if isinstance(value, tuple | list):
        return any(_holds_tensor(item, depth - 1) for item in value)
    return any(_holds_tensor(item, depth - 1) for item in getattr(value, "__dict__", {}).values())
