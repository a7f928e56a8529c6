"""Values at the model's end: what is shown to a block, and what comes back of it.

What comes from a runner is hostile until it has been checked: it may only name tensors and objects that were shown, and
new data is copied out of the window before it is looked at.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from nnsight import InputError, NNsight
from nnsight_ndif.edges import Edges
from nnsight_ndif.errors import FrameError
from nnsight_ndif.served import moved
from nnsight_ndif.values import PLAIN, pack_simple, same_bytes, unknown, unpack_simple
from nnsight_ndif.window import Window
from nnsight_ndif.wire import Special

_MAX_DIMENSIONS = 64
_MAX_SHOWN = 1_000_000


class Shown:
    """The tensors and objects that a block has been shown and may still hold.

    Args:
        root: the model.
        incoming: the window that the runner fills; `outgoing` the one it reads.
    """

    def __init__(self, root: NNsight, incoming: Window, outgoing: Window) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._paths = {id(envoy._module): path for path, envoy in root.named_modules()}
        self._modules = {path: envoy._module for path, envoy in root.named_modules()}
        self._tables = {id(tensor) for tensor in (*root._module.parameters(), *root._module.buffers())}
        self._values: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}
        self._versions: dict[int, int] = {}
        self.edges = Edges()
        #: The classes of the objects shown: a block may send new ones of them.
        self._kinds: dict[tuple[str, str], Any] = {}
        self._last = 0

    # -- to the block ----------------------------------------------------------------------------------------------

    def pack(self, value: Any) -> Any:
        """Return what has changed of the tensors shown before, and the data that stands for a value.

        Raises:
            InputError: it is too large, or cannot be shown.
        """
        self._outgoing.begin()
        try:
            return [self._refreshed(), self._pack(value, set())]
        except FrameError as error:
            raise InputError(f"What the block asked for cannot be shown to it: {error}") from None

    def _refreshed(self) -> list[Any]:
        """Return the tensors that the block holds and that have been edited here since: there they must read so, too.

        Tensors that share memory share their count of edits, so an edit of one by the block refreshes the others.
        """
        changed = [
            number
            for number, version in self._versions.items()
            if version >= 0 and not self._values[number].is_inference() and self._values[number]._version != version
        ]
        return [self._pack_tensor(self._values[number]) for number in changed]

    def _pack(self, value: Any, met: set[int]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._pack_tensor(value)
        found = pack_simple(value, lambda inner: self._pack(inner, met))
        if found is not NotImplemented:
            return found
        if isinstance(value, nn.Module) and id(value) in self._paths:
            return Special("module", self._paths[id(value)])
        return self._pack_object(value, met)

    def _pack_tensor(self, tensor: torch.Tensor) -> Special:
        known = self._numbers.get(id(tensor))
        version = -1 if tensor.is_inference() else tensor._version
        if known is not None and version >= 0 and self._versions[known] == version:
            return Special("same", known)
        number = self._number(tensor)
        self._versions[number] = version
        place, history = self._outgoing.put(tensor), self.edges.show(tensor)
        return Special("tensor", [number, place, id(tensor) in self._tables, history])

    def _pack_object(self, value: Any, met: set[int]) -> Special:
        kind = type(value)
        name = [kind.__module__, kind.__qualname__]
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            return Special("named", [0, *name, [self._pack(item, met) for item in value]])
        number = self._number(value)
        if number in met:
            return Special("again", number)
        met.add(number)
        self._kinds[kind.__module__, kind.__qualname__] = kind
        if isinstance(value, type) or callable(value) or not hasattr(value, "__dict__"):
            return Special("opaque", [number, *name])
        items = None
        if isinstance(value, dict):
            items = [[self._pack(key, met), self._pack(item, met)] for key, item in value.items()]
        return Special("object", [number, *name, items, {n: self._pack(v, met) for n, v in vars(value).items()}])

    def _number(self, value: Any) -> int:
        known = self._numbers.get(id(value))
        if known is not None:
            return known
        if len(self._values) >= _MAX_SHOWN:
            raise FrameError("a block holds more values of the model than it may")
        self._last += 1
        self._values[self._last] = value
        self._numbers[id(value)] = self._last
        return self._last

    # -- from the block --------------------------------------------------------------------------------------------

    def forget(self, numbers: Any) -> None:
        """Let go of what the block holds no more."""
        if type(numbers) is not list:
            raise FrameError("a message lists no values to forget")
        for number in numbers:
            if type(number) is int and number in self._values:
                self._numbers.pop(id(self._values.pop(number)), None)
                self._versions.pop(number, None)

    def apply_edits(self, edits: Any) -> None:
        """Bring edits in place that a block has made to the tensors that it edited.

        Raises:
            FrameError: they are malformed.
            InputError: a parameter or buffer was edited.
        """
        if type(edits) is not list:
            raise FrameError("a message lists no edits")
        edited = [
            self._tensor(edit[0]).untyped_storage()._cdata
            for edit in edits
            if type(edit) is list
            and len(edit) == 4
            and type(edit[0]) is int
            and edit[1] is not None
            and edit[2] is True
        ]
        if len(set(edited)) < len(edited):
            raise InputError(
                "The block has edited two tensors in place that share their memory in the model. In a runner they do "
                "not: edit them through one of the two, or read a value in between."
            )
        for edit in edits:
            match edit:
                case [int(number), None, True, key]:
                    self._want(self._tensor(number), key)
                case [int(number), place, bool(is_certain), key]:
                    self._apply(self._tensor(number), self._incoming.get(place), is_certain, number, key)
                case _:
                    raise FrameError("an edit in a message is malformed")

    def _want(self, tensor: torch.Tensor, key: Any) -> None:
        """Have the model compute gradients back to a tensor that it has shown."""
        if tensor.requires_grad or not tensor.is_leaf or not (tensor.is_floating_point() or tensor.is_complex()):
            raise FrameError("a message wants gradients of what has them, or cannot")
        if id(tensor) in self._tables:
            raise InputError("The block wants gradients of a weight that is frozen. Thaw it in the model, or clone it.")
        self.edges.tie(tensor.requires_grad_(), key, is_end=False)

    def _apply(self, tensor: torch.Tensor, new: torch.Tensor, is_certain: bool, number: int, key: Any) -> None:
        if new.shape != tensor.shape or new.dtype != tensor.dtype:
            raise FrameError(f"an edit has shape {tuple(new.shape)} for a tensor of shape {tuple(tensor.shape)}")
        if not is_certain and same_bytes(tensor.detach().cpu(), new):
            return  # it was only looked at with other eyes than torch's
        if id(tensor) in self._tables:
            raise InputError(
                "The block has edited a parameter or buffer of the model in place. A block in a runner must leave the "
                "weights as they are: change what a module returns instead, or clone the weight."
            )
        if key is not None:
            self.edges.tie(new.requires_grad_(), key)
        with torch.set_grad_enabled(key is not None):
            tensor.copy_(new)
        if not tensor.is_inference():
            self._versions[number] = tensor._version

    def unpack(self, data: Any) -> Any:
        """Return the value that a runner's data stands for. New tensors are on the CPU.

        Raises:
            FrameError: it stands for no value, or for one that was not shown.
        """
        found = unpack_simple(data, self.unpack)
        if found is not NotImplemented:
            return found
        match data:
            case Special("new", place):
                return self._incoming.get(place)
            case Special("tied", [place, key]):
                leaf = self._incoming.get(place)
                if not (leaf.is_floating_point() or leaf.is_complex()):
                    raise FrameError("a message gives a history to a tensor that can have none")
                self.edges.tie(leaf.requires_grad_(), key)
                with torch.enable_grad():
                    return leaf.clone()  # the model may edit it in place, which a leaf does not allow
            case Special("same", int(number)):
                return self._value(number)
            case Special("part", [int(number), list(shape), list(steps), int(offset), str(history)]):
                return part_of(self._tensor(number), shape, steps, offset, history)
            case Special("module", str(path)) if path in self._modules:
                return self._modules[path]
            case Special("named", list(items)):
                return tuple([self.unpack(item) for item in items])  # `fit` gives it the names of what it replaces
            case Special("object", [int(number), items, dict(fields)]):
                return self._rebuild(self._value(number), items, fields)
            case Special("made", [str(module), str(name), items, dict(fields)]) if (module, name) in self._kinds:
                return self._make(self._kinds[module, name], items, fields)
        raise unknown(data)

    def _make(self, kind: Any, items: Any, fields: dict[Any, Any]) -> Any:
        """Return a new object of a class that was shown, without calling anything of it."""
        new = kind.__new__(kind)
        if items is not None:
            if not issubclass(kind, dict) or type(items) is not list:
                raise FrameError("an object in a message is no dict")
            put = OrderedDict.__setitem__ if issubclass(kind, OrderedDict) else dict.__setitem__
            for item in items:
                if type(item) is not list or len(item) != 2:
                    raise FrameError("a dict in a message is malformed")
                put(new, self.unpack(item[0]), self.unpack(item[1]))
        for name, data in fields.items():
            if type(name) is not str or name.startswith("__"):
                raise FrameError("an object in a message has fields without names")
            object.__setattr__(new, name, self.unpack(data))
        return new

    def _rebuild(self, old: Any, items: Any, fields: dict[Any, Any]) -> Any:
        """Return an object that was shown with what has changed in it; itself when nothing has."""
        if not hasattr(old, "__dict__") or isinstance(old, type):
            raise FrameError("an object in a message is none that has fields")
        if fields.keys() != vars(old).keys():
            raise InputError(
                f"The block has changed a {type(old).__name__} that has other fields now: {sorted(vars(old))}. "
                "Change it at the location where it is read."
            )
        new = copy.copy(old)
        is_same = True
        if items is not None:
            if not isinstance(old, dict) or type(items) is not list:
                raise FrameError("an object in a message is no dict")
            for item in items:
                if type(item) is not list or len(item) != 2 or (key := self.unpack(item[0])) not in old:
                    raise FrameError("a dict in a message has other keys")
                value = self.unpack(item[1])
                if not _is(value, old[key]):
                    is_same = False
                    new[key] = fit(value, old[key], f"{type(old).__name__}[{key!r}]")
        for name, data in fields.items():
            value, before = self.unpack(data), vars(old)[name]
            if not _is(value, before):
                is_same = False
                object.__setattr__(new, name, fit(value, before, f"{type(old).__name__}.{name}"))
        return old if is_same else new

    def _value(self, number: int) -> Any:
        if number not in self._values:
            raise FrameError(f"a message names the value {number}, which was not shown")
        return self._values[number]

    def _tensor(self, number: int) -> torch.Tensor:
        found = self._value(number)
        if not isinstance(found, torch.Tensor):
            raise FrameError(f"a message takes the value {number} for a tensor")
        return found


def part_of(base: torch.Tensor, shape: list[Any], steps: list[Any], offset: int, history: str) -> torch.Tensor:
    """Return a view of a tensor, as a block has one of what it was shown.

    Args:
        base: the tensor.
        shape: that of the view; `steps` and `offset` are counted in elements of the tensor laid out densely.
        history: whether the view is a "part" of what the tensor was computed from, a "leaf" of its own, or "none".

    Raises:
        FrameError: it is not within the tensor.
    """
    numbers = [*shape, *steps, offset]
    if (
        len(shape) != len(steps)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(n) is int and 0 <= n < 1 << 40 for n in numbers)
    ):
        raise FrameError("a part of a tensor in a message is malformed")
    last = sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
    if not all(shape) or offset + last >= base.numel() or math.prod(shape) > 1 << 40:
        raise FrameError("a part of a tensor in a message is not within it")
    with torch.set_grad_enabled(history == "part"):
        whole = (base if history == "part" else base.detach()).contiguous()
        part = whole.as_strided(shape, steps, whole.storage_offset() + offset)
    return part.requires_grad_() if history == "leaf" or (history == "part" and part.is_leaf) else part


def fit(new: Any, old: Any, where: str) -> Any:
    """Return a value to put in the place of another, with its tensors where the old ones are.

    Args:
        new: comes from a block.
        old: stands there.
        where: what messages call the place.

    Raises:
        InputError: it is of another structure, or a tensor in it has another shape or dtype.
    """
    if new is old:
        return old
    if isinstance(old, torch.Tensor):
        if not isinstance(new, torch.Tensor):
            raise InputError(f"`{where}` is a tensor of shape {tuple(old.shape)}; the block assigned {_describe(new)}.")
        if new.shape != old.shape or new.dtype != old.dtype:
            raise InputError(
                f"`{where}` is a tensor of shape {tuple(old.shape)} and {old.dtype}; the block assigned one of shape "
                f"{tuple(new.shape)} and {new.dtype}. In a runner both must stay."
            )
        return new.to(old.device)
    if type(new) is not type(old) and not _are_fields(new, old):
        raise InputError(f"`{where}` holds {_describe(old)}; the block assigned {_describe(new)}.")
    if isinstance(old, tuple | list):
        if len(new) != len(old):
            raise InputError(f"`{where}` holds {len(old)} items; the block assigned {len(new)}.")
        items = [fit(*pair, f"{where}[{index}]") for index, pair in enumerate(zip(new, old, strict=True))]
        return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)
    if type(old) is dict:
        if new.keys() != old.keys():
            raise InputError(f"`{where}` has the keys {list(old)}; the block assigned {list(new)}.")
        return {key: fit(item, old[key], f"{where}[{key!r}]") for key, item in new.items()}
    return new


def fit_arguments(new: Any, old: Any, where: str) -> Any:
    """Return arguments to put in the place of others. Keyword arguments may be added: a call may be given any.

    Args:
        new: `(args, kwargs)`, from a block.
        old: stand there.
        where: what messages call the place.

    Raises:
        InputError: they are none, or one that was there has another structure, shape or dtype.
    """
    match new:
        case (tuple(args), dict(kwargs)) if all(type(name) is str for name in kwargs):
            pass
        case _:
            raise InputError(f"`{where}` holds (args, kwargs); the block assigned {_describe(new)}.")
    device = next((t.device for t in (*old[0], *old[1].values()) if isinstance(t, torch.Tensor)), torch.device("cpu"))
    added = {name: moved(value, device) for name, value in kwargs.items() if name not in old[1]}
    kept = {name: value for name, value in kwargs.items() if name in old[1]}
    fitted = fit((args, kept), old, where)
    return fitted[0], {**fitted[1], **added}


def _is(value: Any, before: Any) -> bool:
    """Return whether what came back is what was shown."""
    if value is before:
        return True
    if type(value) is not type(before) and not _are_fields(value, before):
        return False
    if isinstance(before, tuple | list):
        return len(value) == len(before) and all(map(_is, value, before))
    if type(before) is dict:
        return list(value) == list(before) and all(_is(value[key], before[key]) for key in before)
    simple = (*PLAIN, set, frozenset, slice, range, torch.dtype, torch.device)
    return isinstance(before, simple) and (value == before or (value != value and before != before))


def _are_fields(value: Any, before: Any) -> bool:
    """Return whether a plain tuple stands for a named one."""
    return type(value) is tuple and hasattr(type(before), "_fields")


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
