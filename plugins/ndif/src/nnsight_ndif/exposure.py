"""Tensors whose memory is reached around torch's count of edits, in the process that runs a block.

`x.numpy()`, `x.data`, storages, dlpack and views that torch does not know as such let code write without the count
moving. Whoever takes one of these ways marks the memory; its tensors are compared by content then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: The marked storages, by address. One that is freed may mark its successor: that is compared for nothing.
_exposed: set[int] = set()
_storage_of: Callable[[torch.Tensor], Any] = torch.Tensor.untyped_storage

#: Methods of tensors that hand out the memory, or views of it that count by themselves.
_METHODS = (
    "numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "_typed_storage", "unsafe_chunk",
    "unsafe_split", "unsafe_split_with_sizes",
)  # fmt: skip
#: Functions that do so with their first argument: where they are, and their names.
_FUNCTIONS = (
    (torch, ("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "_unsafe_view")),
    (torch.utils.dlpack, ("to_dlpack",)),
    (torch._C, ("_to_dlpack",)),
)


def address(tensor: torch.Tensor) -> int:
    """Return where a tensor's memory begins, without marking it."""
    return int(_storage_of(tensor).data_ptr())


def storage(tensor: torch.Tensor) -> int:
    """Return what tells a tensor's storage from others, without marking it."""
    return int(_storage_of(tensor)._cdata)


def is_exposed(tensor: Any) -> bool:
    """Return whether a tensor's memory has been reached around torch."""
    return isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and address(tensor) in _exposed


def watch() -> None:
    """Mark memory from now on. Called once, in a process that only runs blocks."""
    for name in _METHODS:
        setattr(torch.Tensor, name, _exposing(getattr(torch.Tensor, name)))
    for owner, names in _FUNCTIONS:
        for name in names:
            if hasattr(owner, name):
                setattr(owner, name, _exposing(getattr(owner, name)))
    data: Any = torch.Tensor.data

    def read(tensor: torch.Tensor) -> Any:
        _expose(tensor)
        return data.__get__(tensor)

    def write(tensor: torch.Tensor, value: Any) -> None:
        data.__set__(tensor, value)
        _expose(tensor)  # it has the memory of `value` now

    torch.Tensor.data = property(read, write)  # type: ignore[assignment]


def forget() -> None:
    """Mark nothing any more: what was reached before the block is run was reached by us."""
    _exposed.clear()


def _exposing(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, torch.Tensor):
            _expose(tensor)
        return method(tensor, *args, **kwargs)

    call.__name__ = method.__name__
    return call


def _expose(tensor: torch.Tensor) -> None:
    if tensor.layout is torch.strided:
        _exposed.add(address(tensor))
