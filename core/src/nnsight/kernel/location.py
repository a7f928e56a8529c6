"""Where in a model a value is: a path and a port, numbered once per tree.

A run counts its visits in a list indexed by these numbers, so that passing a location nobody asked for costs an
integer addition.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nnsight.kernel.interleaver import Interleaver

ROOT = "model"
_lock = threading.Lock()  # threads that trace one model may number locations of it at once


class Location(NamedTuple):
    """A place that a run can reach, such as `model.transformer.h.3` `output`."""

    path: str
    port: str

    def __str__(self) -> str:
        return f"{self.path}.{self.port}" if self.port else self.path


#: Says why a run did not reach a location, by its number; "" when there is nothing to say.
Explain = Callable[["Interleaver", int], str]


class Tree:
    """The numbering of all locations under one root. It refers to no module and no envoy.

    Attributes:
        locations: the location of each number.
        result: the number of what the traced call returns.
        ends: the numbers of the locations at which no step can follow any more.
        aliases: path -> another name that the user gave: where it is reached from, and the name.
    """

    __slots__ = ("__weakref__", "_given", "_numbers", "_reserved", "aliases", "ends", "locations", "result")

    def __init__(self) -> None:
        self.locations: list[Location] = []
        self._numbers: dict[Location, int] = {}
        self._reserved: dict[Hashable, tuple[range, int, Explain]] = {}
        self._given: dict[int, int] = {}
        self.result = self.number(ROOT, "result")
        self.ends = [self.result]
        self.aliases: dict[str, tuple[str, str]] = {}

    def number(self, path: str, port: str) -> int:
        """Return the number of a location, giving it the next one when it is new."""
        location = Location(path, port)
        number = self._numbers.get(location)
        if number is None:
            with _lock:
                number = self._numbers.setdefault(location, len(self.locations))
                if number == len(self.locations):
                    self.locations.append(location)
        return number

    def reserve(
        self,
        key: Hashable,
        locations: Callable[[], list[Location]],
        around: int,
        explain: Explain,
        given: Mapping[int, int],
    ) -> int:
        """Number several locations in a row, when `key` is new; return the number of the first.

        Args:
            key: what they belong to.
            locations: makes them.
            around: the number of the input of the module they lie in.
            explain: asked when one of them was not reached although that module was called.
            given: which of them passes what an output is made of, where that is not the input before it.
        """
        known = self._reserved.get(key)
        if known is None:
            made = locations()
            with _lock:
                first = len(self.locations)
                known = self._reserved.setdefault(key, (range(first, first + len(made)), around, explain))
                if known[0].start == first:
                    self.locations += made
                    self._given.update({first + output: first + number for output, number in given.items()})
        return known[0].start

    def given(self, number: int) -> int | None:
        """Return the location at which what an output is made of passes; None where that is not known."""
        before = self.locations[number - 1]
        if before.port == "input" and before.path == self.locations[number].path:
            return number - 1
        return self._given.get(number)

    def reservation(self, number: int) -> tuple[int, Explain] | None:
        """Return what `reserve` was told of a location: the module around it, and what explains why it was missed."""
        return next(((around, why) for numbers, around, why in self._reserved.values() if number in numbers), None)

    def add_module(self, path: str) -> int:
        """Number the input of a module; its output has the number after it."""
        with _lock:
            first = len(self.locations)
            self.locations += (Location(path, "input"), Location(path, "output"))
        return first

    def show(self, number: int, with_port: bool = True) -> str:
        """Return a location for a message, or the module it is at, also as the user calls it."""
        location = self.locations[number] if with_port else Location(self.locations[number].path, "")
        called = location._replace(path=self._called(location.path, self.aliases))
        return f"`{location}`" if called == location else f"`{location}` (`{called}`)"

    def _called(self, path: str, aliases: dict[str, tuple[str, str]]) -> str:
        above, dot, name = path.rpartition(".")
        if path in aliases:
            above, name = aliases[path]
            aliases = {target: alias for target, alias in aliases.items() if target != path}  # names may go round
            dot = "."
        return f"{self._called(above, aliases)}.{name}" if dot else path

    def is_end(self, number: int) -> bool:
        """Return whether a location comes once, when no step can follow any more."""
        return number in self.ends or (number - 1 in self.ends and self.locations[number].port == "output")

    def __getitem__(self, number: int) -> Location:
        return self.locations[number]

    def __len__(self) -> int:
        return len(self.locations)
