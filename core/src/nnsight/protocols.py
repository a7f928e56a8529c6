"""What the parts of the library, and plugins, promise each other."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one block feeds the model, as a model class has prepared it.

    Attributes:
        args: positional arguments of the traced call.
        kwargs: keyword arguments of the traced call.
        rows: how many rows of the batch these are; None when there is no input at all.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None


class Naming(Protocol):
    """What gives the modules of a tree other names and envoys of other classes. It must not refer to the tree."""

    def class_of(self, path: str, module: Any, default: type[Any]) -> type[Any]:
        """Return the envoy class of the module at a path; called while the tree grows."""

    def apply(self, root: Any) -> None:
        """Give every envoy below a root its other names; called when the tree was built and when it has changed."""


@runtime_checkable
class Locatable(Protocol):
    """What has places of its own in a run, besides the modules: an operation inside a forward, or several of them."""

    def locate(self, block: Any) -> list[tuple[int, int]]:
        """Let the run of a block reach it from now on.

        Returns:
            The numbers of inputs and outputs in that run; -1 for an input that there is none of.

        Raises:
            InputError: it is of another model.
        """


@runtime_checkable
class Standing(Protocol):
    """What a plugin has put in place for a run, in `Interleaver.closing`, and can put in place again.

    A part of a run is computed again during backward where it lies in a checkpointed region.
    """

    def __call__(self) -> None:
        """Take it away; called when the run is closed."""

    def again(self, run: Any) -> None:
        """Put it in place for what stands in for the run, and add what takes it away to its `closing`."""


@runtime_checkable
class Backend(Protocol):
    """A place where blocks run: `model.trace(x, backend=mine)`."""

    def open_block(
        self, envoy: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], function: Any, batched: bool
    ) -> Any:
        """Return what is to be entered by the `with`: most often a `Capture`, which is given the block.

        Args:
            envoy: what is traced.
            method: the method that was called: "trace", "generate", "session", ...
            args: the user's arguments.
            kwargs: the user's keyword arguments.
            function: what runs the model, where it is not the module itself; a method's name, or a function.
            batched: whether invokes are one batch.
        """


class Deferred:
    """A value that several blocks bring together, known when all have been served."""

    def resolve(self) -> Any:
        """Return the value."""
        raise NotImplementedError


class Portable(Protocol):
    """A class of a package whose instances travel as other values: to where a block runs, or back as its results."""

    def __nnsight_pack__(self) -> Any:
        """Return what the instance is made of: anything that can travel."""

    @classmethod
    def __nnsight_unpack__(cls, root: Any, content: Any) -> Any:
        """Return an instance made of that. The content may come from anybody: look at it, call nothing of it.

        Args:
            root: the root envoy of the model here; None where there is none.
            content: what `__nnsight_pack__` returned at the other end.

        Raises:
            ValueError, TypeError, LookupError: it cannot be such content.
        """


class Helped(Protocol):
    """A model class with objects beside the module, such as a tokenizer, which a block in another process may use.

    Attributes:
        helpers: the name of each, an attribute of the model, and those of its methods that may be called with whatever
            a block gives them: they compute, and touch no file and no network.
    """

    helpers: Mapping[str, frozenset[str]]


class Elsewhere(Protocol):
    """A name on envoys (entry-point group `nnsight.envoy`) that a block has in a process without the model, too.

    At the model's end `described` makes plain data of what it means, and `enter` is called when the block asks for a
    location that it has numbered; `made` makes of the data what the block gets.
    """

    def described(self, envoy: Any, steps: list[str], how: str) -> tuple[Any, dict[str, Any]] | None:
        """Return what `enter` is given, and the data: `first` and `size` say which locations of the tree it has."""

    def enter(self, described: Any, offset: int) -> None:
        """Let the run of the open block reach one of these locations."""

    def made(
        self, find: Callable[[str], Any], path: str, ask: Callable[..., Any], placed: Callable[[int, int, int], None]
    ) -> Any:
        """Return what the block gets at a module.

        Args:
            find: returns the envoy at a path.
            path: the module's.
            ask: returns the data that `described` gives at the model's end for path, steps and how.
            placed: is to be told the first number of locations there, how many they are, and their first number here.
        """


class PerCode(Generic[T]):
    """A cache that belongs to code objects: by identity, never by file and line, and gone with the code.

    The values must not refer to the code.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[CodeType], dict[Any, T]]] = {}
        self._lock = threading.RLock()  # held while collecting garbage, perhaps: what is forgotten takes it again

    def of(self, code: CodeType) -> dict[Any, T]:
        """Return the values kept for one code object, to be read and added to: the same ones in every thread."""
        entry = self._known.get(id(code))  # code objects compare by content: equal code from two files is not the same
        return entry[1] if entry is not None and entry[0]() is code else self._new(code)

    def _new(self, code: CodeType) -> dict[Any, T]:
        key, known, lock = id(code), self._known, self._lock

        def forget(reference: weakref.ref[CodeType]) -> None:
            with lock:
                if key in known and known[key][0] is reference:  # the place may be another code object's by now
                    del known[key]

        with lock:
            entry = known.get(key)  # another thread may have been here meanwhile
            if entry is None or entry[0]() is not code:
                entry = known[key] = (weakref.ref(code, forget), {})
            return entry[1]
