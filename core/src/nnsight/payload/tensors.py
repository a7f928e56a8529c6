"""Tensors and numpy arrays as pieces of memory and views of them: what shares memory still does after the journey.

The writer notes which bytes each value covers. Overlapping ones become one piece, so it is sent once, and bytes that no
value covers are not sent. A piece is laid down as a flat tensor of bytes: in a safetensors file, in shared memory.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: The dtypes that travel, by name.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "int64", "int32", "int16",
        "int8", "uint8", "uint16", "uint32", "uint64", "bool", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
        "float8_e5m2fnuz", "float8_e8m0fnu",
    )
    if hasattr(torch, name)
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Put = Callable[[torch.Tensor], Any]


@dataclass(slots=True)
class _View:
    """What one value covers of its memory.

    Attributes:
        owner: keeps the memory; a tensor or an array.
        first: the address of its first element; from `low` to `high` is what it covers.
        steps: the strides in bytes.
    """

    owner: Any
    dtype: str
    shape: Sequence[int]
    steps: Sequence[int]
    first: int
    low: int
    high: int
    size: int
    flags: str


class TensorTable:
    """Collects the tensors and arrays of a payload."""

    def __init__(self) -> None:
        self._views: list[_View] = []
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []

    def __len__(self) -> int:
        return len(self._views)

    def add(self, tensor: torch.Tensor) -> int:
        """Take a tensor; return its number.

        Raises:
            TypeError: it is of a kind that does not travel; the message says which.
        """
        return self._add(tensor, lambda: _tensor_view(tensor))

    def add_array(self, array: Any) -> int:
        """Take a numpy array; return its number.

        Raises:
            TypeError: its elements are no plain memory; the message says so.
        """
        return self._add(array, lambda: _array_view(array))

    def _add(self, value: Any, view: Callable[[], _View]) -> int:
        number = self._numbers.get(id(value))
        if number is None:
            self._views.append(view())
            self._kept.append(value)  # so that no other object gets its `id`
            number = self._numbers[id(value)] = len(self._views) - 1
        return number

    def lay(self, put: Put) -> list[Any]:
        """Lay down all pieces; return the places that `put` gave them, and the views, as JSON has them.

        Args:
            put: takes a flat tensor of bytes on the CPU, most often a view of the memory of the values; returns where
                it is.
        """
        pieces: list[list[_View]] = []
        for view in sorted((view for view in self._views if view.size), key=lambda view: (view.low, -view.high)):
            group = pieces[-1] if pieces else None
            if group and view.low < max(other.high for other in group) and _device(view) == _device(group[0]):
                group.append(view)
            else:
                pieces.append([view])
        places, described = [], {}
        for number, group in enumerate(pieces):
            piece, start = _cut(group)
            places.append(put(piece))
            for view in group:
                described[id(view)] = _describe(view, number, view.first - start)
        return [places, [described.get(id(view)) or _describe(view, -1, 0) for view in self._views]]


def _tensor_view(tensor: torch.Tensor) -> _View:
    kind = type(tensor)
    if kind not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError("a subclass of torch.Tensor")
    name = NAMES.get(tensor.dtype)
    if name is None or tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise TypeError(f"of {tensor.dtype}, {tensor.layout} on {tensor.device}")
    flags = ("p" if kind is torch.nn.Parameter else "") + ("g" if tensor.requires_grad else "")
    flags += "h" if tensor.requires_grad and not tensor.is_leaf else ""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.numel() and plain.data_ptr() % plain.element_size():
        plain = plain.clone()
    view = _of_tensor(plain, name, flags)
    if view.high - view.low > view.size:
        view.owner = plain
    return view


def _of_tensor(tensor: torch.Tensor, name: str, flags: str) -> _View:
    each = tensor.element_size()
    steps = [step * each for step in tensor.stride()]
    first = tensor.data_ptr() if tensor.numel() else 0
    high = first + each + sum((count - 1) * step for count, step in zip(tensor.shape, steps, strict=True))
    return _View(tensor, name, list(tensor.shape), steps, first, first, high, tensor.numel() * each, flags)


def _array_view(array: Any) -> _View:
    if array.dtype.hasobject or not is_plain(array.dtype.str):
        raise TypeError(f"of {array.dtype}")
    flags = "a" + ("" if array.flags.writeable else "r")
    first = array.__array_interface__["data"][0] if array.size else 0
    low, high = first, first + array.dtype.itemsize
    for count, step in zip(array.shape, array.strides, strict=True):
        low, high = low + min(0, (count - 1) * step), high + max(0, (count - 1) * step)
    return _View(array, array.dtype.str, array.shape, array.strides, first, low, high, array.nbytes, flags)


def _device(view: _View) -> Any:
    return view.owner.device if isinstance(view.owner, torch.Tensor) else torch.device("cpu")


def _cut(group: list[_View]) -> tuple[torch.Tensor, int]:
    """Return the bytes that views cover, and the address that the first of them had."""
    low, high = group[0].low, max(view.high for view in group)
    if len(group) == 1 and high - low > group[0].size:
        return _compact(group[0])
    base = next((view.owner for view in group if isinstance(view.owner, torch.Tensor)), None)
    if base is not None and not base.is_cpu:
        storage = base.untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8, device=base.device).set_(storage)
        return whole[low - storage.data_ptr() : high - storage.data_ptr()].cpu(), low
    piece = _bytes_at(low, high - low, [view.owner for view in group])
    if all((view.first - low) % _item_size(view) == 0 for view in group):
        return piece, low
    padded = torch.zeros(low % 16 + len(piece), dtype=torch.uint8)  # so that every element is at a place it can be at
    padded[low % 16 :] = piece
    return padded, low - low % 16


def _compact(view: _View) -> tuple[torch.Tensor, int]:
    """Return the bytes of a value without the gaps between its elements; changes the view."""
    if isinstance(view.owner, torch.Tensor):
        dense = view.owner.cpu().contiguous()
        new = _of_tensor(dense, view.dtype, view.flags)
    else:
        dense = view.owner.copy("C")
        new = _array_view(dense)
    view.owner, view.steps, view.first = dense, new.steps, new.first
    return _bytes_at(new.first, new.size, [dense]), new.first


def _bytes_at(address: int, size: int, owners: list[Any]) -> torch.Tensor:
    """Return memory of others as a flat tensor, which keeps them alive."""
    memory: Any = (ctypes.c_ubyte * size).from_address(address)
    memory.owners = owners
    return torch.frombuffer(memory, dtype=torch.uint8)


def _item_size(view: _View) -> int:
    return DTYPES[view.dtype].itemsize if "a" not in view.flags else 1


def _describe(view: _View, piece: int, offset: int) -> list[Any]:
    steps = None if list(view.steps) == _dense(view) else list(view.steps)
    return [piece, view.dtype, list(view.shape), steps, offset, view.flags]


def _dense(view: _View) -> list[int]:
    each = DTYPES[view.dtype].itemsize if "a" not in view.flags else view.owner.dtype.itemsize
    return dense_steps(view.shape, each)


def dense_steps(shape: Sequence[int], each: int) -> list[int]:
    """Return the strides, in bytes, of a contiguous value."""
    return [each * math.prod(shape[index + 1 :]) for index in range(len(shape))]


def is_plain(name: str) -> bool:
    """Return whether a numpy dtype is that of plain memory: numbers, times, text of a fixed size."""
    kind, digits = name[1:2], name[2:].partition("[")[0]
    return name[:1] in ("<", ">", "|") and kind in tuple("biufcSUMm") and digits.isdecimal() and len(digits) < 7


def is_array(value: object) -> bool:
    """Return whether a value is a numpy array, without importing numpy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray
