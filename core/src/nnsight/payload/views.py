"""Reading what `tensors` describes: every view is checked against the piece of memory it is of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nnsight._warning import warn_user
from nnsight.errors import PayloadError, PayloadWarning
from nnsight.payload.tensors import DTYPES, dense_steps, is_plain

_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 1 << 40

Get = Callable[[Any], torch.Tensor]


class Views:
    """The tensors and arrays of a payload, each made when it is first asked for.

    Args:
        described: what `TensorTable.lay` returned.
        get: returns the bytes at a place, as a flat tensor that nobody else uses.

    Raises:
        PayloadError: it is malformed.
    """

    def __init__(self, described: Any, get: Get) -> None:
        match described:
            case [list(places), list(views)]:
                self._places, self._views = places, views
            case _:
                raise PayloadError("The table of tensors in this payload is malformed.")
        self._get = get
        self._pieces: dict[int, torch.Tensor] = {}
        self._made: dict[int, Any] = {}

    def get(self, number: object) -> Any:
        """Return a tensor or array.

        Raises:
            PayloadError: there is none, or it is not within the memory it is said to be in.
        """
        if type(number) is not int or not 0 <= number < len(self._views):
            raise PayloadError(f"This payload refers to a tensor {number!r}, which is not in it.")
        if number not in self._made:
            self._made[number] = self._make(self._views[number], number)
        return self._made[number]

    def _make(self, view: Any, number: int) -> Any:
        match view:
            case [int(piece), str(dtype), list(shape), steps, int(offset), str(flags)] if _are_sizes(shape):
                pass
            case _:
                raise PayloadError(f"The tensor {number} of this payload is not described as one.")
        if math.prod(shape) > _MAX_ELEMENTS or not (steps is None or (_are_ints(steps) and len(steps) == len(shape))):
            raise PayloadError(f"The tensor {number} of this payload has the shape {shape} and the strides {steps}.")
        memory = self._piece(piece) if math.prod(shape) else torch.empty(0, dtype=torch.uint8)
        if "a" in flags:
            return _array(memory, dtype, shape, steps, offset, flags)
        return _tensor(memory, dtype, shape, steps, offset, flags)

    def _piece(self, number: int) -> torch.Tensor:
        if not 0 <= number < len(self._places):
            raise PayloadError(f"This payload refers to the piece of memory {number}, which is not in it.")
        if number not in self._pieces:
            self._pieces[number] = self._get(self._places[number])
        return self._pieces[number]


def _tensor(memory: torch.Tensor, name: str, shape: list[int], steps: Any, offset: int, flags: str) -> torch.Tensor:
    dtype = DTYPES.get(name)
    if dtype is None:
        raise PayloadError(f"This payload holds a tensor of dtype {name!r}, which this version does not know.")
    each = dtype.itemsize
    steps = dense_steps(shape, each) if steps is None else steps
    if math.prod(shape):
        _check_bounds(memory, shape, steps, offset, each)
        if min(steps, default=0) < 0 or offset % each or any(step % each for step in steps):
            raise PayloadError("A tensor in this payload is at a place where none of its dtype can be.")
        storage, strides = memory.untyped_storage(), [step // each for step in steps]
        tensor = torch.empty(0, dtype=dtype).set_(storage, offset // each, shape, strides)
        if dtype is torch.bool:
            _check_bools(memory, lambda: tensor.view(torch.uint8), math.prod(shape))
    else:
        tensor = torch.empty(shape, dtype=dtype)
    wants = _wants_gradient(tensor, flags)
    if "p" in flags:
        return torch.nn.Parameter(tensor, requires_grad=wants)
    if wants and "h" in flags:
        with torch.enable_grad():
            arrived: torch.Tensor = _Computed.apply([tensor], torch.empty(0, requires_grad=True))  # type: ignore[no-untyped-call]
        return arrived
    return tensor.requires_grad_(wants)


class _Computed(torch.autograd.Function):
    """Makes a tensor that was computed at the other end one that is no leaf: it can be edited in place, as there.

    What it was computed from has stayed there, so gradients end here.
    """

    @staticmethod
    def forward(ctx: Any, given: list[torch.Tensor], anchor: torch.Tensor) -> torch.Tensor:
        return given[0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        warn_of_end()
        return None, None


_END = (
    "Gradients end at a value that a block in another process has computed or edited: what it was made of has stayed "
    "there, so nothing before it gets any. Call backward inside of the block, or use `.detach()` if that is meant."
)


def warn_of_end() -> None:
    """Tell the user that a pass of gradients has come to a value whose history has stayed at the other end."""
    warn_user(_END, PayloadWarning, also=("torch", "nnsight_ndif"))


def _wants_gradient(tensor: torch.Tensor, flags: str) -> bool:
    if "g" in flags and not (tensor.is_floating_point() or tensor.is_complex()):
        raise PayloadError(f"A tensor of {tensor.dtype} in this payload wants gradients, and can have none.")
    return "g" in flags


def _array(memory: torch.Tensor, name: str, shape: list[int], steps: Any, offset: int, flags: str) -> Any:
    try:
        import numpy as np  # lazy: only where the other end had it
    except ImportError:
        raise PayloadError("This payload holds a numpy array, and numpy is not installed here. Install it.") from None
    try:
        dtype = np.dtype(name) if is_plain(name) else None
        if dtype is None or (len(shape) > 32 and len(shape) > getattr(np, "MAXDIMS", 32)):
            raise TypeError(name)
    except (TypeError, ValueError):
        raise PayloadError(f"This payload holds a numpy array of dtype {name!r}, which cannot be.") from None
    each = dtype.itemsize
    if not math.prod(shape) or not each:
        array = np.empty(shape, dtype)
    else:
        steps = dense_steps(shape, each) if steps is None else steps
        _check_bounds(memory, shape, steps, offset, each)
        array = np.ndarray(shape, dtype, memory.numpy(), offset, steps)
        if dtype.kind == "b":
            _check_bools(memory, lambda: array.view("u1"), math.prod(shape))
    array.flags.writeable = "r" not in flags
    return array


def _check_bounds(memory: torch.Tensor, shape: list[int], steps: Sequence[int], offset: int, each: int) -> None:
    ways = [(count - 1) * step for count, step in zip(shape, steps, strict=True)]
    low, high = offset + sum(min(0, way) for way in ways), offset + sum(max(0, way) for way in ways) + each
    if low < 0 or high > memory.numel():
        raise PayloadError(
            f"A tensor of shape {shape} in this payload reaches from byte {low} to {high} of a piece of "
            f"{memory.numel()} bytes."
        )


def _check_bools(memory: torch.Tensor, view: Callable[[], Any], count: int) -> None:
    """Check that a value of bools holds nothing else, which operations on it would take for granted."""
    # The memory first: a view may go over the same bytes again and again.
    if bool((memory > 1).any()) and (count > memory.numel() or bool((view() > 1).any())):
        raise PayloadError("A tensor of bools in this payload holds something else.")


def _are_ints(value: Any) -> bool:
    return type(value) is list and all(type(item) is int and abs(item) < 1 << 48 for item in value)


def _are_sizes(value: list[Any]) -> bool:
    return len(value) <= _MAX_DIMENSIONS and _are_ints(value) and all(item >= 0 for item in value)
