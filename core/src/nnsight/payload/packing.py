"""Values as data that JSON can hold. What cannot be expressed is refused; the way back is `unpacking`.

JSON's own values stand for themselves; anything else is a list that begins with its kind. Objects that are met twice go
into a table, so that they are one object at the other end, too. No pickle: nothing is called to take an object apart.
"""

from __future__ import annotations

import base64
import collections
import functools
import logging
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from nnsight.errors import UnsendableError
from nnsight.kernel.envoy import Envoy
from nnsight.payload import library
from nnsight.payload.instances import attributes, is_named, is_scalar, is_takeable, kind_name, uncompiled
from nnsight.payload.known import known_data
from nnsight.payload.tensors import TensorTable, is_array

if TYPE_CHECKING:
    from nnsight.payload.describing import Descriptions

MAX_DEPTH = 40
_MAX_BITS = 10_000
_OWN = (type(None), bool, str)
_REMEDY = (
    "Values of Python's own types, tensors, numpy arrays, functions, classes and their instances from your files, "
    "modules and what installed packages define can be; make anything else inside of the block."
)

_RESULTS_REMEDY = (
    "Values of Python's own types, tensors, numpy arrays, and instances of classes that are defined outside of the "
    "block can come back; save what you need of it as such."
)
_HINT = " Or bind what the block needs of the object to a variable before the block, and use that."

#: A step on the way to what cannot travel, and why it cannot.
Reason = str


class RefusedError(Exception):
    """Something cannot travel. Knows how it was reached, from the inside outwards."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.steps: list[str] = []


class Packer:
    """Makes data of values.

    Args:
        root: the model: its envoys and modules travel as paths.
        where: the block, for messages.

    Attributes:
        tensors: the tensors and arrays met.
        descriptions: the functions, classes, cells and modules of the user's files that were met; None to refuse them.
        shared: the data of what was met more than once.
        given: returns data by which the other end knows a value already, None for any other.
        own: functions and classes that the other end has sent: by `id`, what it calls them, and what they are.
    """

    def __init__(self, root: Any, where: str = "") -> None:
        self._root = root
        self.where = where
        self.tensors = TensorTable()
        self.descriptions: Descriptions | None = None
        self.shared: list[Any] = []
        self.given: Callable[[Any], Any] | None = None
        self.own: dict[int, tuple[list[Any], Any]] = {}
        #: The data of each object that may be met again, by `id`, and the object, so that the `id` stays its own.
        self._met: dict[int, tuple[Any, list[Any]]] = {}
        self._open: dict[int, int | None] = {}
        self._depth = 0
        #: What is being packed, for messages.
        self.what = ""

    def met(self) -> Iterable[tuple[Any, list[Any]]]:
        """Return the objects that were packed, each with the data that stands for it."""
        return self._met.values()

    def named(self, what: str, value: Any) -> Any:
        """Return a value as data.

        Args:
            what: what messages call it.
            value: the value.

        Raises:
            UnsendableError: something in it cannot travel; names it, its type, and what to do.
        """
        return self.guarded(what, lambda: self.pack(value))

    def guarded(self, what: str, pack: Callable[[], Any]) -> Any:
        """Return what a function that packs something returns; what it refuses is told to the user."""
        self.what = what
        try:
            return pack()
        except RefusedError as error:
            place = "".join(f", {step}" for step in reversed(error.steps))
            of_block = f" of the block at {self.where}" if self.where else ""
            hint = _HINT if any(step.startswith("its attribute") for step in error.steps) else ""
            way = "come back" if self.descriptions is None else "be sent"
            raise UnsendableError(f"{what}{of_block} cannot {way}{place}: {error}{hint}") from None

    def pack(self, value: Any) -> Any:
        """Return a value as data.

        Raises:
            RefusedError: it cannot be.
        """
        kind = type(value)
        if kind in _OWN:
            return value
        if kind is int:
            if value.bit_length() > _MAX_BITS:
                raise RefusedError(f"it is an integer of {value.bit_length()} bits. Make it inside of the block.")
            return value
        if kind is float:
            return value if math.isfinite(value) else ["float", str(value)]
        met = self._met.get(id(value))
        if met is not None:
            return self._again(value, met[1])
        small = _SMALL.get(kind)
        if small is not None:
            return small(value)
        return self._pack_new(value, kind)

    def _again(self, value: Any, data: list[Any]) -> Any:
        """Return the data of an object that was met before: from now on both times it is one in the table."""
        if data and data[0] in ("shared", "given", "tensor", "array", "function", "class", "module", "namespace"):
            return data
        if id(value) in self._open:
            number = self._open[id(value)]
            if number is None:
                raise RefusedError(
                    f"it is a {kind_name(type(value))} that contains itself. Make it inside of the block."
                )
            return ["shared", number]
        self.shared.append(list(data))
        data[:] = ["shared", len(self.shared) - 1]
        return data

    def _pack_new(self, value: Any, kind: type) -> Any:
        if self._depth >= MAX_DEPTH:
            raise RefusedError(f"it is nested more than {MAX_DEPTH} deep. Make it inside of the block.")
        data: list[Any] = []
        self._met[id(value)] = value, data
        self._depth += 1
        try:
            self._fill(data, value, kind)
        except RefusedError:
            del self._met[id(value)]  # it may be met again by one who can do without it
            raise
        finally:
            self._depth -= 1
            number = self._open.pop(id(value), None)
        if number is not None:
            self.shared[number] = list(data)
            data[:] = ["shared", number]
        return data

    def _fill(self, data: list[Any], value: Any, kind: type) -> None:
        """Put the data of an object into the list that stands for it."""
        if self.given is not None and (known := self.given(value)) is not None:
            data += ["given", known]
        elif isinstance(value, torch.Tensor):
            data += ["tensor", self._take(self.tensors.add, value)]
        elif is_array(value):
            data += ["array", self._take(self.tensors.add_array, value)]
        elif kind in _SEQUENCES:
            self._open[id(value)] = None
            data.append(kind.__name__)
            self.items(data, value)
        elif kind is dict:
            self._open[id(value)] = None
            data.append("dict")
            self.pairs(data, value)
        elif kind is slice:
            data += ["slice", self.pack(value.start), self.pack(value.stop), self.pack(value.step)]
        elif kind is bytearray:
            data += ["bytearray", base64.b64encode(value).decode()]
        elif (known := known_data(value)) is not None:
            data += known
        elif isinstance(value, Envoy):
            data += ["envoy", self._path_of(value)]
        elif self.descriptions is not None and (found := library.reference(value)) is not None:
            data += ["import", *found]
        else:
            self._fill_object(data, value)

    def _fill_object(self, data: list[Any], value: Any) -> None:
        value = uncompiled(value)
        kind = type(value)
        if id(value) in self.own:
            data += self.own[id(value)][0]
        elif isinstance(value, Enum):
            name = value.name if value.name in kind.__members__ else None
            data += ["member", self.pack(kind), name, None if name else self.pack(value.value)]
        elif isinstance(value, torch.nn.Module) and (path := self._module_path(value)) is not None:
            data += ["submodule", path]
        elif is_scalar(value):
            data += ["scalar", self._take(self.tensors.add_array, value.reshape(()))]
        elif (pack := getattr(kind, "__nnsight_pack__", None)) is not None:
            data += ["portable", self.pack(kind), self.pack(pack(value))]
        elif self.descriptions is None and isinstance(value, type):
            self._fill_class(data, value)
        elif (name := self._helper_name(value)) is not None:
            data += ["attribute", ["envoy", str(self._root.path)], name]
        elif self.descriptions is not None and self._fill_code(data, value, kind, self.descriptions):
            pass
        else:
            try:
                is_done = self._fill_instance(data, value, kind)
            except RefusedError:
                self._point_to_helper(kind)
                raise
            if not is_done:
                self._point_to_helper(kind)
                raise self.refusal(value)

    def _fill_class(self, data: list[Any], value: type) -> None:
        """Let a class be the one that the other end has under its name: no code is sent."""
        module = sys.modules.get(value.__module__)
        if module is None or library.at(module, value.__qualname__) is not value:
            raise RefusedError(f"the class `{value.__qualname__}` is none that the other end has. {_RESULTS_REMEDY}")
        data += ["import", value.__module__, value.__qualname__]

    def _fill_code(self, data: list[Any], value: Any, kind: type, descriptions: Descriptions) -> bool:
        """Put the data of what is there to be called into a list; return whether it is that."""
        if isinstance(value, types.MethodType):
            data += ["attribute", self._inner("its object", value.__self__), value.__func__.__name__]
        elif isinstance(value, types.BuiltinMethodType) and value.__self__ is not None:
            data += ["attribute", self._inner("its object", value.__self__), value.__name__]
        elif kind is logging.Logger:
            data += ["logger", value.name]
        elif isinstance(value, functools.partial):
            data += ["partial", self.pack(value.func), self.pack(value.args), self.pack(value.keywords)]
        elif kind is typing.TypeVar:
            data += ["typevar", value.__name__]
        elif typing.get_origin(value) is not None:
            data += ["alias", *_alias(self, value)]
        elif isinstance(value, _PARTS):
            data += ["attribute", self.pack(value.__objclass__), value.__name__]
        else:
            return descriptions.fill(data, value)
        return True

    def _fill_instance(self, data: list[Any], value: Any, kind: type) -> bool:
        """Take apart an instance whose state is in its attributes and items; return whether it is one."""
        if is_named(kind):
            self._open[id(value)] = None
            data += ["named", self.pack(kind)]
            self.items(data, value)
            return True
        if kind in (collections.deque, collections.defaultdict):
            self._open[id(value)] = None
            extra = value.maxlen if isinstance(value, collections.deque) else self.pack(value.default_factory)
            data += [kind.__name__, extra]
            (self.items if isinstance(value, collections.deque) else self.pairs)(data, value)
            return True
        if not is_takeable(value):
            return False
        self._open[id(value)] = len(self.shared)  # it may refer to itself
        self.shared.append(None)
        pairs: list[Any] = ["dict"]
        if isinstance(value, dict):
            self.pairs(pairs, value)
        fields: dict[str, Any] = {}
        for name, item in attributes(value):
            try:
                fields[name] = self._inner(f"its attribute {name!r}", item)
            except RefusedError:
                if not isinstance(value, collections.UserDict) or not name.startswith("_"):
                    raise
                fields[name] = None  # the dict is what it is; an encoding of tokens also keeps what it was made of
        data += ["instance", self.pack(kind), fields, pairs if isinstance(value, dict) else None]
        return True

    def items(self, data: list[Any], value: Iterable[Any]) -> None:
        """Append the data of the items of a container."""
        index = 0
        try:
            for item in value:
                data.append(self.pack(item))
                index += 1
        except RefusedError as error:
            error.steps.append(f"item {index}")
            raise

    def pairs(self, data: list[Any], value: dict[Any, Any]) -> None:
        """Append the data of the keys and values of a dict, in turns."""
        key = None
        try:
            for key, item in value.items():
                data.append(self.pack(key))
                data.append(self.pack(item))
        except RefusedError as error:
            error.steps.append(f"item {key!r:.60}")
            raise

    def _inner(self, step: str, value: Any) -> Any:
        try:
            return self.pack(value)
        except RefusedError as error:
            error.steps.append(step)
            raise

    def _take(self, add: Callable[[Any], int], value: Any) -> int:
        try:
            return add(value)
        except TypeError as error:
            remedy = "can come back" if self.descriptions is None else "can be; make anything else inside of the block"
            raise RefusedError(
                f"it is a {kind_name(type(value))}, {error}. Dense tensors of the usual dtypes, and arrays of numbers "
                f"{remedy}."
            ) from None

    def _path_of(self, envoy: Envoy) -> str:
        if self._root is None or envoy.root._module is not self._root._module:
            raise RefusedError(
                f"it is `{envoy.path}` of another model than the one that is traced. A block can use one model at a "
                "time: trace the other one on its own, and use what you have saved of it."
            )
        return envoy.path

    def _module_path(self, module: torch.nn.Module) -> str | None:
        if self._root is None:
            return None
        if module is self._root._module:
            return str(self._root.path)
        found = self._root._envoys.get(id(module))
        return None if found is None or found._module is not module else str(found.path)

    def _helper_name(self, value: Any) -> str | None:
        """Return what the model calls something that stands beside its modules, such as its tokenizer."""
        if self._root is None or self.descriptions is None:
            return None
        helpers: Iterable[str] = getattr(type(self._root), "helpers", ())
        return next((name for name in helpers if getattr(self._root, name, None) is value), None)

    def _point_to_helper(self, kind: type) -> None:
        """Raise when what cannot travel is of a kind that the model has beside its modules: that one is to be used."""
        helpers: Iterable[str] = getattr(type(self._root), "helpers", ()) if self.descriptions is not None else ()
        for name in helpers:
            if type(getattr(self._root, name, None)) is kind:
                raise RefusedError(
                    f"it is a {kind_name(kind)} of its own. Use that of the model, which stays with it: `model.{name}`."
                )

    def refusal(self, value: Any) -> RefusedError:
        """Return the error for a value that cannot travel."""
        return RefusedError(
            f"it is a {kind_name(type(value))}. {_RESULTS_REMEDY if self.descriptions is None else _REMEDY}"
        )


def _alias(packer: Packer, value: Any) -> list[Any]:
    """Return the data of a type with arguments, such as `list[int]` or `int | None`: what it is of, and those."""
    origin: Any = typing.get_origin(value)
    if type(value).__module__ == "typing":  # its own name for what it is of, where it has one: `typing.Callable`
        origin = getattr(typing, getattr(value, "_name", None) or "", origin)
    if origin is typing.Optional:
        origin = typing.Union
    arguments = [None if kind is type(None) else kind for kind in typing.get_args(value)]
    return [packer.pack(None if origin is types.UnionType else origin), *map(packer.pack, arguments)]


_PARTS = (types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType)
_SEQUENCES = (list, tuple, set, frozenset)
_SMALL: dict[type, Callable[[Any], Any]] = {
    complex: lambda value: ["complex", str(value.real), str(value.imag)],
    bytes: lambda value: ["bytes", base64.b64encode(value).decode()],
    range: lambda value: ["range", value.start, value.stop, value.step],
    type(Ellipsis): lambda value: ["ellipsis"],
    type(NotImplemented): lambda value: ["notimplemented"],
    torch.Size: lambda value: ["size", *value],
    torch.dtype: lambda value: ["torch", str(value).partition(".")[2]],
    torch.layout: lambda value: ["torch", str(value).partition(".")[2]],
    torch.memory_format: lambda value: ["torch", str(value).partition(".")[2]],
    torch.device: lambda value: ["device", str(value)],
    re.Pattern: lambda value: ["pattern", value.pattern, value.flags],
}
