"""Values made of the data that `packing` has made of them.

Everything is checked before it is used: a payload may come from anybody. What it says of functions and classes is code,
and is run by `defining` alone: where `definitions` is None it is refused, for whoever wants values and runs nothing.
"""

from __future__ import annotations

import base64
import binascii
import collections
import functools
import importlib
import logging
import operator
import re
import sys
import typing
from collections.abc import Callable, Mapping
from enum import Enum, Flag
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from nnsight.errors import PayloadError
from nnsight.kernel.envoy import Envoy
from nnsight.payload import library
from nnsight.payload.instances import can_take, is_named, put_attribute
from nnsight.payload.known import KINDS, known_value
from nnsight.payload.views import Views

if TYPE_CHECKING:
    from nnsight.payload.defining import Definitions

_MAX_DEPTH = 200


class Unpacker:
    """Makes values of data.

    Args:
        shared: the data of what occurs more than once.
        views: the tensors and arrays.
        resolve: returns the envoy at a path.
        submodule: returns what stands for the module at a path.

    Attributes:
        definitions: the functions and classes; None where none may be, and nothing may be imported or called.
        root: the model, for what is made with it; None where there is none.
        given: returns the value that data of `Packer.given` stands for.
        own: functions and classes that were sent from here, by what the payload they were in calls them.
        device: returns the device to use for one that the sender had.
    """

    def __init__(
        self, shared: Any, views: Views, resolve: Callable[[str], Any], submodule: Callable[[str], Any]
    ) -> None:
        if type(shared) is not list:
            raise PayloadError("The table of shared objects in this payload is malformed.")
        self._shared = shared
        self._made: dict[int, Any] = {}
        self._making: set[int] = set()
        self._views = views
        self._resolve = resolve
        self._submodule = submodule
        self._depth = 0
        self.definitions: Definitions | None = None
        self.root: Any = None
        self.given: Callable[[Any], Any] | None = None
        self.own: Mapping[tuple[str, int], Any] = {}
        self.device: Callable[[str], torch.device] = torch.device

    def value(self, data: Any) -> Any:
        """Return the value that some data stands for.

        Raises:
            PayloadError: it stands for none.
        """
        kind = type(data)
        if kind in _PLAIN:
            return data
        if kind is not list or not data or type(data[0]) is not str:
            raise PayloadError(f"This payload holds a {kind.__name__} that stands for no value.")
        make = _KINDS.get(data[0])
        if make is None or self._depth >= _MAX_DEPTH:
            raise PayloadError(f"This payload holds a value of the kind {data[0]!r:.60}, which this version has not.")
        self._depth += 1
        try:
            return make(self, data)
        except _MALFORMED as error:
            if isinstance(error, PayloadError):
                raise
            raise PayloadError(f"This payload holds a malformed value of the kind {data[0]!r}: {error}.") from None
        finally:
            self._depth -= 1

    def empty(self, data: Any) -> list[Any] | dict[Any, Any] | set[Any] | None:
        """Return an empty container of the kind that some data stands for, None where it stands for none."""
        if type(data) is list and data[:1] == ["shared"] and type(data[1]) is int and 0 <= data[1] < len(self._shared):
            data = self._shared[data[1]]
        kinds: dict[Any, Any] = {"list": list, "dict": dict, "set": set}
        kind = kinds.get(data[0]) if type(data) is list and data and type(data[0]) is str else None
        return None if kind is None else kind()

    def items(self, data: list[Any]) -> list[Any]:
        """Return the values that a list of data stands for."""
        return [self.value(item) for item in data]

    def pairs(self, data: list[Any]) -> list[tuple[Any, Any]]:
        """Return the keys and values of data that has them in turns."""
        if len(data) % 2:
            raise ValueError("it has a key without a value")
        return [(self.value(data[index]), self.value(data[index + 1])) for index in range(0, len(data), 2)]

    def shared(self, number: Any) -> Any:
        """Return an object that occurs more than once."""
        if type(number) is not int or not 0 <= number < len(self._shared):
            raise IndexError(f"there is no shared object {number!r}")
        if number in self._made:
            return self._made[number]
        if number in self._making:
            raise ValueError("it contains itself")
        data = self._shared[number]
        self._making.add(number)
        try:
            if type(data) is list and data[:1] == ["instance"]:
                return self.instance(data, number)
            self._made[number] = made = self.value(data)
            return made
        finally:
            self._making.discard(number)

    def instance(self, data: list[Any], number: int | None = None) -> Any:
        """Return an instance with the attributes and items that it had. Nothing that its class defines is called."""
        _, kind, fields, pairs = data
        cls = self.value(kind)
        if not isinstance(cls, type) or type(fields) is not dict or not can_take(cls):
            raise TypeError("it is no instance of a class that can be made of its attributes")
        bases: tuple[Any, ...] = (collections.OrderedDict, dict, SimpleNamespace, object)
        base = next(base for base in bases if issubclass(cls, base))
        new: Any = base.__new__(cls)
        if number is not None:
            self._made[number] = new  # before its attributes: one of them may be it
        try:
            if pairs is not None:
                put = collections.OrderedDict if issubclass(cls, collections.OrderedDict) else dict
                for key, item in self.pairs(pairs[1:]):
                    put.__setitem__(new, key, item)
            for name, item in fields.items():
                if name.startswith("__") and name.endswith("__"):
                    raise ValueError(f"it has an attribute {name!r}")
                put_attribute(new, name, self.value(item))
        except BaseException:
            if number is not None:
                del self._made[number]
            raise
        return new

    def imported(self, module: str, name: str) -> Any:
        """Return what an installed package has under a name.

        Raises:
            PayloadError: it is not there.
        """
        if type(module) is not str or type(name) is not str:
            raise TypeError("it names no module")
        if self.definitions is None:  # only what is loaded, and only classes: they are looked at, not called
            loaded = importlib.import_module(module) if module.startswith("nnsight.") else sys.modules.get(module)
            found = library.at(loaded, name)
            if not isinstance(found, type):
                raise PayloadError(
                    f"This payload names {module}.{name}, which is no class that this program has loaded."
                )
            return found
        try:
            found = importlib.import_module(module)
            for part in name.split(".") if name else ():
                found = getattr(found, part)
        except (ImportError, AttributeError, ValueError) as error:
            called = f"{module}.{name}" if name else module
            raise PayloadError(
                f"The block uses `{called}`, which is not to be had here: {error}. Install the version of "
                f"{module.partition('.')[0]} that the sender has, or put the code into the block."
            ) from error
        return found

    def _defined(self, data: list[Any]) -> Any:
        if self.definitions is not None:
            return self.definitions.get(data)
        match data:
            case [str(kind), int(number)] if (kind, number) in self.own:
                return self.own[kind, number]
        raise PayloadError(f"This payload holds a {data[0]} where only values may be.")

    def _given(self, data: Any) -> Any:
        if self.given is None:
            raise PayloadError("This payload refers to a value that is not in it.")
        return self.given(data)

    def _envoy(self, path: Any) -> Any:
        found = self._in_tree(self._resolve, path)
        if not isinstance(found, Envoy):
            raise PayloadError(f"The block uses `{path}`, which is no module of the model here.")
        return found

    def _in_tree(self, find: Callable[[str], Any], path: Any) -> Any:
        if type(path) is not str:
            raise TypeError("it has no path")
        try:
            return find(path)
        except (LookupError, AttributeError) as error:
            raise PayloadError(f"The block uses `{path}`, which is not in the model here: {error}") from None

    def _called(self, data: list[Any]) -> Any:
        """Return what a function of the library's or the user's makes."""
        if self.definitions is None:
            raise PayloadError(f"This payload holds a {data[0]} where only values may be.")
        match data:
            case ["attribute", owner, str(name)]:
                return getattr(self.value(owner), name)
            case ["partial", function, args, keywords]:
                return functools.partial(self.value(function), *self.value(args), **self.value(keywords))
            case ["cached", function, maxsize, bool(typed)]:
                return functools.lru_cache(maxsize, typed)(self.value(function))
            case ["logger", str(name)]:
                return logging.getLogger(name)
            case ["typevar", str(name)]:
                return typing.TypeVar(name)
            case ["alias", None, *kinds]:
                return functools.reduce(operator.or_, self.items(kinds))
            case ["alias", origin, *arguments]:
                found = self.items(arguments)
                return self.value(origin)[found[0] if len(found) == 1 else tuple(found)]
        raise ValueError("it is malformed")

    def _device(self, name: Any) -> torch.device:
        if type(name) is not str:  # torch takes a number for the one of the accelerator that is here
            raise TypeError("it has no name")
        return self.device(name)

    def _member(self, data: list[Any]) -> Any:
        _, kind, name, value = data
        cls = self.value(kind)
        if not isinstance(cls, type) or not issubclass(cls, Enum):
            raise TypeError("it is no member of an enum")
        if name is not None:
            return cls.__members__[name]
        if not issubclass(cls, Flag) or type(value) is not int:  # an enum of another kind may have code for others
            raise TypeError("it is no member of its enum")
        return cls(value)

    def _portable(self, data: list[Any]) -> Any:
        _, kind, content = data
        make = getattr(self.value(kind), "__nnsight_unpack__", None)
        if make is None:
            raise TypeError("its class cannot be made of what travels")
        return make(self.root, self.value(content))

    def _named(self, data: list[Any]) -> Any:
        cls = self.value(data[1])
        if not isinstance(cls, type) or not is_named(cls):
            raise TypeError("it is no named tuple")
        items = self.items(data[2:])
        if not hasattr(cls, "_fields"):
            return cls(items)  # made by torch in C: it takes as many as it has names
        if len(items) != len(getattr(cls, "_fields", ())):
            raise ValueError("it has not the fields of its class")
        return tuple.__new__(cls, items)


def _torch_constant(name: str) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype | torch.layout | torch.memory_format):
        raise ValueError(f"torch has no {name!r}")
    return found


def _float(text: Any) -> float:
    if text not in ("inf", "-inf", "nan", "-nan"):
        raise ValueError("it is no number")
    return float(text)


def _bytes(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def _range(start: Any, stop: Any, step: Any) -> range:
    return range(start, stop, step)


def _default(unpacker: Unpacker, data: list[Any]) -> Any:
    factory = unpacker.value(data[1])
    if unpacker.definitions is None and factory not in (None, list, dict, set, int, float):
        raise ValueError("its default is no type of Python's own")
    return collections.defaultdict(factory, unpacker.pairs(data[2:]))


#: What comes of data that is not as it should be.
_MALFORMED = (
    ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError, MemoryError, re.error,
)  # fmt: skip
_PLAIN = (type(None), bool, int, float, str)
_KINDS: dict[str, Callable[[Unpacker, list[Any]], Any]] = {
    "list": lambda unpacker, data: unpacker.items(data[1:]),
    "tuple": lambda unpacker, data: tuple(unpacker.items(data[1:])),
    "set": lambda unpacker, data: set(unpacker.items(data[1:])),
    "frozenset": lambda unpacker, data: frozenset(unpacker.items(data[1:])),
    "dict": lambda unpacker, data: dict(unpacker.pairs(data[1:])),
    "deque": lambda unpacker, data: collections.deque(unpacker.items(data[2:]), data[1]),
    "defaultdict": _default,
    "float": lambda unpacker, data: _float(data[1]),
    "complex": lambda unpacker, data: complex(float(data[1]), float(data[2])),
    "bytes": lambda unpacker, data: _bytes(data[1]),
    "bytearray": lambda unpacker, data: bytearray(_bytes(data[1])),
    "slice": lambda unpacker, data: slice(*unpacker.items(data[1:4])),
    "range": lambda unpacker, data: _range(*data[1:4]),
    "ellipsis": lambda unpacker, data: Ellipsis,
    "notimplemented": lambda unpacker, data: NotImplemented,
    "size": lambda unpacker, data: torch.Size(data[1:]),
    "torch": lambda unpacker, data: _torch_constant(data[1]),
    "device": lambda unpacker, data: unpacker._device(data[1]),
    "tensor": lambda unpacker, data: unpacker._views.get(data[1]),
    "array": lambda unpacker, data: unpacker._views.get(data[1]),
    "scalar": lambda unpacker, data: unpacker._views.get(data[1])[()],
    **dict.fromkeys(KINDS, lambda unpacker, data: known_value(data)),
    "given": lambda unpacker, data: unpacker._given(data[1]),
    "envoy": lambda unpacker, data: unpacker._envoy(data[1]),
    "submodule": lambda unpacker, data: unpacker._in_tree(unpacker._submodule, data[1]),
    "shared": lambda unpacker, data: unpacker.shared(data[1]),
    "instance": lambda unpacker, data: unpacker.instance(data),
    "named": lambda unpacker, data: unpacker._named(data),
    "portable": lambda unpacker, data: unpacker._portable(data),
    "member": lambda unpacker, data: unpacker._member(data),
    "import": lambda unpacker, data: unpacker.imported(data[1], data[2]),
    "function": lambda unpacker, data: unpacker._defined(data),
    "class": lambda unpacker, data: unpacker._defined(data),
    "namespace": lambda unpacker, data: unpacker._defined(data),
    "attribute": lambda unpacker, data: unpacker._called(data),
    "partial": lambda unpacker, data: unpacker._called(data),
    "cached": lambda unpacker, data: unpacker._called(data),
    "pattern": lambda unpacker, data: re.compile(data[1], data[2]),
    "logger": lambda unpacker, data: unpacker._called(data),
    "typevar": lambda unpacker, data: unpacker._called(data),
    "alias": lambda unpacker, data: unpacker._called(data),
}
