"""What both ends of a conversation do alike with values: looking into them, and plain data that stands for them.

Tensors travel in a window and keep an identity: the model's end numbers each that it shows, so that the same tensor
met again is the same object for the block, and an edit of it in place finds its way back. Objects that are no plain
data (a model's output class, a cache) are numbered too, and only their fields travel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nnsight_ndif.errors import FrameError
from nnsight_ndif.window import DTYPES
from nnsight_ndif.wire import Special

PLAIN = (type(None), bool, int, float, complex, str, bytes)
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def pack_simple(value: Any, pack: Callable[[Any], Any]) -> Any:
    """Return the data that stands for a value of Python's or torch's own types; `NotImplemented` for any other.

    Args:
        value: what is packed.
        pack: called with what is in a container.
    """
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is list:
        return [pack(item) for item in value]
    if kind is tuple:
        return tuple([pack(item) for item in value])
    if kind is dict:
        return {pack(key): pack(item) for key, item in value.items()}
    if kind in (set, frozenset):
        return Special(kind.__name__, [pack(item) for item in value])
    if kind is slice:
        return Special("slice", [pack(value.start), pack(value.stop), pack(value.step)])
    if kind is range:
        return Special("range", [value.start, value.stop, value.step])
    if kind is torch.Size:
        return Special("size", list(value))
    if kind is torch.device:
        return Special("device", str(value))
    if kind is torch.dtype and value in _DTYPE_NAMES:
        return Special("dtype", _DTYPE_NAMES[value])
    return Special("ellipsis", None) if value is Ellipsis else NotImplemented


def unpack_simple(data: Any, unpack: Callable[[Any], Any]) -> Any:
    """Return the value that `pack_simple` made data of; `NotImplemented` for anything else."""
    kind = type(data)
    if kind in PLAIN:
        return data
    if kind is list:
        return [unpack(item) for item in data]
    if kind is tuple:
        return tuple([unpack(item) for item in data])
    if kind is dict:
        return {unpack(key): unpack(item) for key, item in data.items()}
    if kind is not Special:
        return NotImplemented
    name, content = data.kind, data.content
    if name in ("set", "frozenset") and type(content) is list:
        items = [unpack(item) for item in content]
        return set(items) if name == "set" else frozenset(items)
    if name == "slice" and type(content) is list and len(content) == 3:
        return slice(*(unpack(item) for item in content))
    if name == "range" and _are_ints(content) and len(content) == 3 and content[2]:
        return range(*content)
    if name == "size" and _are_ints(content):
        return torch.Size(content)
    if name == "dtype" and type(content) is str and content in DTYPES:
        return DTYPES[content]
    if name == "device" and type(content) is str:
        return torch.device("cpu")
    return Ellipsis if name == "ellipsis" else NotImplemented


def unknown(data: Any) -> FrameError:
    """Return the error for data that stands for nothing."""
    told = f"of kind {data.kind!r}" if isinstance(data, Special) else f"a {type(data).__name__}"
    return FrameError(f"a message holds something {told} that stands for no value")


def is_plain(value: Any) -> bool:
    """Return whether a value is data of Python's own, through lists, tuples and dicts."""
    return is_data(value, PLAIN)


def is_data(value: Any, kinds: tuple[Any, ...] = (*PLAIN, torch.Tensor, torch.nn.Parameter)) -> bool:
    """Return whether a value is of some types, through lists, tuples and dicts."""
    if type(value) in (list, tuple):
        return all(is_data(item, kinds) for item in value)
    if type(value) is dict:
        return all(type(key) in PLAIN and is_data(item, kinds) for key, item in value.items())
    return type(value) in kinds


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two tensors of one shape and dtype, on the CPU, hold the same bits."""
    left, right = left.contiguous(), right.contiguous()
    return torch.equal(left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8))


def _are_ints(content: Any) -> bool:
    return type(content) is list and all(type(item) is int for item in content)
