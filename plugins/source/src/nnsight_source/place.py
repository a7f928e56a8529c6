"""Where a module's forward is looked up, and how another callable gets there for the time of a run.

A forward of the class is reached through a function that stands in the class and asks which run is executing; the
module itself is not touched, so copies and pickles taken meanwhile are clean. A forward kept on the instance (as
accelerate does) is replaced there by an object that copies and pickles as what it stands for. Everything is counted,
and whoever is not in a run that looks into this module gets the original.
"""

from __future__ import annotations

import copy
import functools
import operator
import threading
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from nnsight_source.peel import peel

NAME = "forward"
_NOTHING: Any = object()
_lock = threading.RLock()

#: Returns what the executing run has in the place of a module's forward; None for nothing.
Lookup = Callable[[nn.Module], Callable[..., Any] | None]


class Anchor:
    """Where the forward of one module is to be replaced.

    Attributes:
        module: the module.
        name: the attribute of the instance that is replaced; "" where the class's forward is.
        value: the callable there: bound for an instance, as the class has it otherwise.
    """

    __slots__ = ("module", "name", "value")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        own = _original(module.__dict__.get(NAME, _NOTHING))
        if own is _NOTHING:
            self.name, self.value = "", class_forward(type(module))
        else:
            self.name, self.value = NAME, own
            while (inner := self._kept_elsewhere()) is not None:
                self.name, self.value = inner

    def bind(self, forward: Any) -> Callable[..., Any]:
        """Return a callable of the anchor's kind as what is called with the arguments alone."""
        bound: Callable[..., Any] = forward if self.name else forward.__get__(self.module, type(self.module))
        return bound

    def _kept_elsewhere(self) -> tuple[str, Any] | None:
        """Return the other attribute of the module that a wrapper says it wraps and fetches at each call."""
        value = self.value
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is None or (isinstance(value, FunctionType) and len(peel(value)[0]) > 1):
            return None
        for name, found in self.module.__dict__.items():
            found = _original(found)
            if name != self.name and found is not value and _is_same(found, wrapped):
                return name, found
        return None


def class_forward(kind: type) -> Any:
    """Return what a class has as its forward, without what stands in front of it."""
    return _original(_lookup(kind))


def _lookup(kind: type) -> Any:
    return next(vars(base)[NAME] for base in kind.__mro__ if NAME in vars(base))


def _original(found: Any) -> Any:
    """Return what was there before us."""
    while (before := getattr(found, "_nnsight_before", _NOTHING)) is not _NOTHING:
        found = before
    return found


def _is_same(found: Any, wrapped: Any) -> bool:
    return isinstance(found, MethodType | FunctionType | partial) and type(found) is type(wrapped) and found == wrapped


class _Standing:
    """What stands somewhere, for how many users."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self.undo = undo
        self.count = 0


_standing: dict[Any, _Standing] = {}


def stand_in(anchor: Anchor, lookup: Lookup) -> Callable[[], None]:
    """Let calls of an anchor's forward ask `lookup` first; return what ends that."""
    module, name = anchor.module, anchor.name
    key = (id(module), name) if name else type(module)
    with _lock:
        standing = _standing.get(key)
        if standing is None:
            undo = _on_instance(module, name, lookup) if name else _on_class(type(module), lookup)
            standing = _standing[key] = _Standing(undo)
        standing.count += 1

    def leave() -> None:
        with _lock:
            standing.count -= 1
            if not standing.count:
                standing.undo()
                if _standing.get(key) is standing:
                    del _standing[key]

    return leave


def _on_class(kind: type, lookup: Lookup) -> Callable[[], None]:
    before = _lookup(kind)
    own = vars(kind).get(NAME, _NOTHING)
    call = before if isinstance(before, FunctionType) else _through_descriptor(before)

    @functools.wraps(call)
    def forward(self: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if type(self) is kind:  # a subclass comes here by `super()`, which is part of its own forward
            found = lookup(self)
            if found is not None:
                return found(*args, **kwargs)
        return call(self, *args, **kwargs)

    forward._nnsight_before = before  # type: ignore[attr-defined]
    setattr(kind, NAME, forward)

    def undo() -> None:
        if vars(kind).get(NAME) is forward:
            if own is _NOTHING:
                delattr(kind, NAME)
            else:
                setattr(kind, NAME, own)

    return undo


def _through_descriptor(found: Any) -> Callable[..., Any]:
    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return found.__get__(self, type(self))(*args, **kwargs)

    return call


def _on_instance(module: nn.Module, name: str, lookup: Lookup) -> Callable[[], None]:
    slot = module.__dict__
    before = slot[name]
    new = slot[name] = StandIn(before, functools.partial(lookup, module))

    def undo() -> None:
        if slot.get(name) is new:
            slot[name] = before

    return undo


class StandIn:
    """Stands for a callable on an instance: the same to whoever looks at it, copies it or pickles it."""

    def __init__(self, before: Any, lookup: Callable[[], Callable[..., Any] | None]) -> None:
        self._nnsight_before = before
        self._lookup = lookup
        self.__wrapped__ = before  # for inspect.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._lookup()
        return (self._nnsight_before if found is None else found)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_nnsight_before":  # while it is being made
            raise AttributeError(name)
        return getattr(self._nnsight_before, name)

    def __eq__(self, other: object) -> bool:
        return self is other or bool(self._nnsight_before == other)

    def __hash__(self) -> int:
        return hash(self._nnsight_before)

    def __copy__(self) -> Any:
        return self._nnsight_before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._nnsight_before, memo)

    def __reduce__(self) -> Any:
        return operator.getitem, ((self._nnsight_before,), 0)
