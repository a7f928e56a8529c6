"""Values at the block's end: what the model has shown, what has become of it, and what is sent back."""

from __future__ import annotations

import importlib
import sys
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any

import torch

from nnsight_ndif import exposure
from nnsight_ndif.bridge import Pins, Pull
from nnsight_ndif.errors import NotInRunnerError
from nnsight_ndif.values import pack_simple, unknown, unpack_simple
from nnsight_ndif.window import Window
from nnsight_ndif.wire import Special


class Opaque:
    """Stands for something of the model that cannot leave it; it can be handed back as it is."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"<{self._name}, which stays with the model>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotInRunnerError(
            f"A {self._name} stays with the model, so a block in a runner cannot reach its {name!r}."
        )


class Held:
    """The values that came from the model and are alive here.

    Args:
        incoming: the window that the model's end fills; `outgoing` the one it reads.
        module: returns the stand-in of the module at a path.
        pull: asks the model for gradients.
    """

    def __init__(self, incoming: Window, outgoing: Window, module: Callable[[str], Any], pull: Pull) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._module = module
        self._values: dict[int, weakref.ref[Any]] = {}
        self._numbers: dict[int, int] = {}
        self._versions: dict[int, int] = {}
        self._dropped: list[int] = []
        #: Keeps tensors until the next message: an edit of one that the block lets go of right away counts, too.
        self._alive: dict[int, torch.Tensor] = {}
        self._pins = Pins(pull)
        #: Which tensors are known to require gradients at the other end.
        self._tracked: set[int] = set()
        #: What was in each object when it was shown, to tell whether the block has changed it.
        self._contents: dict[int, list[Any]] = {}
        #: The classes of objects that the model has shown: the block may send others of them.
        self._kinds: set[tuple[str, str]] = set()
        #: Storages of parameters and buffers, which have no rows of a batch.
        self.tables: set[int] = set()

    # -- from the model --------------------------------------------------------------------------------------------

    def unpack(self, data: Any) -> Any:
        """Return the value that the model's data stands for."""
        found = unpack_simple(data, self.unpack)
        if found is not NotImplemented:
            return found
        match data:
            case Special("tensor", [number, place, is_table, history]):
                return self._tensor(number, place, is_table, history)
            case Special("fresh", place):
                return self._incoming.get(place)
            case Special("same" | "again", number):
                known = self._known(number)
                if known is None:
                    raise unknown(data)
                return known
            case Special("module", path):
                return self._module(path)
            case Special("opaque", [number, _, name]):
                return self._known(number) or self._keep(number, Opaque(name))
            case Special("named", [_, module, name, items]):
                kind = _class(module, name)
                values = [self.unpack(item) for item in items]
                return tuple(values) if kind is None else kind(*values)
            case Special("object", [number, module, name, items, fields]):
                return self._object(number, _class(module, name), name, items, fields)
        raise unknown(data)

    def _tensor(self, number: int, place: Any, is_table: bool, history: list[Any] | None) -> torch.Tensor:
        tensor: torch.Tensor | None = self._known(number)
        new = self._incoming.get(place)
        if history is not None:
            new = self._pins.connect(new, *history)
        if tensor is None:
            tensor = self._keep(number, new)
            if is_table:
                self.tables.add(exposure.storage(tensor))
        else:
            with torch.set_grad_enabled(history is not None):
                tensor.copy_(new)  # the model has edited it since
        if history is not None:
            self._pins.pin(tensor, history[0])
            self._tracked.add(number)
        self._versions[number] = tensor._version
        self._alive[number] = tensor
        return tensor

    def _object(self, number: int, kind: Any, name: str, items: Any, fields: dict[str, Any]) -> Any:
        is_dict = items is not None
        new = self._known(number)
        if new is None:
            # `__weakrefoffset__` is 0 where there can be no weak references: such an object could not be followed.
            is_usable = kind is not None and is_dict == issubclass(kind, dict) and bool(kind.__weakrefoffset__)
            new = self._keep(number, kind.__new__(kind) if is_usable else Opaque(name))
        if isinstance(new, Opaque):
            return new
        kind = type(new)
        self._kinds.add((kind.__module__, kind.__qualname__))
        if is_dict:
            put = OrderedDict.__setitem__ if issubclass(kind, OrderedDict) else dict.__setitem__
            for key, item in items:
                put(new, self.unpack(key), self.unpack(item))
        for field, item in fields.items():
            object.__setattr__(new, field, self.unpack(item))
        self._contents[number] = contents(new, [])[1:]
        return new

    def _known(self, number: int) -> Any:
        """Return what has this number and is alive, None for nothing."""
        known = self._values.get(number)
        return None if known is None else known()

    def _keep(self, number: int, value: Any) -> Any:
        self._values[number] = weakref.ref(value)
        self._numbers[id(value)] = number
        weakref.finalize(value, self._drop, number, id(value)).atexit = False
        return value

    def _drop(self, number: int, place: int) -> None:
        self._values.pop(number, None)
        self._versions.pop(number, None)
        self._contents.pop(number, None)
        self._tracked.discard(number)
        if self._numbers.get(place) == number:
            del self._numbers[place]
        self._dropped.append(number)

    # -- to the model ----------------------------------------------------------------------------------------------

    def begin(self) -> tuple[list[int], list[Any]]:
        """Start a message; return what is held no more, and the edits in place since the last one."""
        self._outgoing.begin()
        edits: list[Any] = []
        tensor: Any = None
        for number, version in list(self._versions.items()):
            tensor = self._values[number]()
            if tensor is None:
                continue
            if tensor.requires_grad and tensor.is_leaf and number not in self._tracked:
                self._tracked.add(number)
                edits.append([number, None, True, self._pins.pin(tensor)])  # the block wants its gradient
            is_certain = tensor._version != version
            if is_certain or exposure.is_exposed(tensor):
                self._versions[number] = tensor._version
                is_tied = is_certain and tensor.requires_grad and not tensor.is_leaf
                key = self._pins.pin(tensor) if is_tied else None
                if is_tied:
                    self._tracked.add(number)
                edits.append([number, self._outgoing.put(tensor), is_certain, key])
        del tensor
        edited = {edit[0] for edit in edits}
        for number in list(self._alive):
            # Held by nobody but us (our dict, and the argument): the block has let go of it.
            if number not in edited and sys.getrefcount(self._alive[number]) <= 2:
                del self._alive[number]
        # Last: with what has been let go of here, or the answer would name as known what is known no more.
        dropped, self._dropped = self._dropped, []
        return dropped, edits

    def _is_untouched(self, number: int, value: Any) -> bool:
        """Return whether an object is as the model has shown it."""
        before, now = self._contents[number], contents(value, [])[1:]
        return len(before) == len(now) and all(old is new for old, new in zip(before, now, strict=True))

    def known(self, value: Any) -> Any:
        """Return the data that stands for a value that came from the model and is as it was shown, None for any other.

        Edits of a tensor in place are sent beside it.
        """
        number = self._numbers.get(id(value))
        if number is None:
            return self._part(value) if type(value) is torch.Tensor else None
        is_same = isinstance(value, torch.Tensor | Opaque) or self._is_untouched(number, value)
        return Special("same", number) if is_same else None

    def _part(self, tensor: torch.Tensor) -> Any:
        """Return the data that stands for a view of a tensor that came from the model, None for any other tensor."""
        if tensor.layout is not torch.strided or not tensor.numel() or tensor.is_conj() or tensor.is_neg():
            return None
        place = exposure.address(tensor)
        for number in self._versions:
            base = self._known(number)
            if base is None or base.dtype != tensor.dtype or not is_within(base, tensor, place):
                continue
            history = "none" if not tensor.requires_grad else "leaf" if tensor.is_leaf else "part"
            return Special(
                "part", [number, list(tensor.shape), list(tensor.stride()), tensor.storage_offset(), history]
            )
        return None

    def pack(self, value: Any) -> Any:
        """Return the data that stands for a value.

        Raises:
            NotInRunnerError: nothing can.
        """
        if isinstance(value, torch.Tensor):
            number = self._numbers.get(id(value))
            if number is not None:
                return Special("same", number)
            place = self._outgoing.put(value)
            return Special("tied", [place, self._pins.pin(value)]) if value.requires_grad else Special("new", place)
        found = pack_simple(value, self.pack)
        if found is not NotImplemented:
            return found
        if isinstance(value, torch.nn.Module) and "_at" in vars(value):
            return Special("module", vars(value)["_at"])  # the stand-in of one of the model's
        if isinstance(value, UserDict) and id(value) not in self._numbers:
            return self.pack(dict(value.data))  # an encoding of tokens: what a model takes is the dict
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return Special("named", [self.pack(item) for item in value])
        number, kind = self._numbers.get(id(value)), type(value)
        if number is not None and (isinstance(value, Opaque) or self._is_untouched(number, value)):
            return Special("same", number)
        if number is None and (kind.__module__, kind.__qualname__) not in self._kinds:
            raise NotInRunnerError(
                f"A {kind.__module__}.{kind.__qualname__} cannot be sent to the model from a runner: tensors, numbers, "
                "text, and lists, tuples and dicts of them can, and what came from the model itself."
            )
        items = None
        if isinstance(value, dict):
            items = [[self.pack(key), self.pack(item)] for key, item in value.items()]
        fields = {name: self.pack(item) for name, item in vars(value).items()}
        if number is None:
            return Special("made", [kind.__module__, kind.__qualname__, items, fields])
        return Special("object", [number, items, fields])


def is_within(base: torch.Tensor, tensor: torch.Tensor, place: int) -> bool:
    """Return whether all of a tensor, whose storage is at `place`, is in the memory of another, dense one."""
    if exposure.address(base) != place or not base.is_contiguous() or base.storage_offset():
        return False
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.storage_offset() + last < base.numel()


def contents(value: Any, found: list[Any]) -> list[Any]:
    """Return everything in a value, containers and all, to tell by identity whether something was put into it."""
    found.append(value)
    if isinstance(value, dict):
        for item in value.values():
            contents(item, found)
    elif isinstance(value, tuple | list):
        for item in value:
            contents(item, found)
    if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor | type | torch.nn.Module | Opaque):
        for item in vars(value).values():
            contents(item, found)
    return found


def _class(module: str, name: str) -> Any:
    """Return a class by its name, None when it is not to be had here."""
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) else None
