"""Where in a model a value is: a path and a port, numbered once per tree.

A run counts its visits in a list indexed by these numbers, so that passing a location nobody asked for costs an
integer addition.
"""

from __future__ import annotations

from typing import NamedTuple

ROOT = "model"


class Location(NamedTuple):
    """A place that a run can reach, such as `model.transformer.h.3` `output`."""

    path: str
    port: str

    def __str__(self) -> str:
        return f"{self.path}.{self.port}" if self.port else self.path


class Tree:
    """The numbering of all locations under one root. It refers to no module and no envoy.

    Attributes:
        locations: the location of each number.
        result: the number of what the traced call returns.
        ends: the numbers of the locations at which no step can follow any more.
    """

    __slots__ = ("__weakref__", "_numbers", "ends", "locations", "result")

    def __init__(self) -> None:
        self.locations: list[Location] = []
        self._numbers: dict[Location, int] = {}
        self.result = self.number(ROOT, "result")
        self.ends = [self.result]

    def number(self, path: str, port: str) -> int:
        """Return the number of a location, giving it the next one when it is new."""
        location = Location(path, port)
        number = self._numbers.get(location)
        if number is None:
            number = self._numbers[location] = len(self.locations)
            self.locations.append(location)
        return number

    def add_module(self, path: str) -> int:
        """Number the input of a module; its output has the number after it."""
        first = len(self.locations)
        self.locations += (Location(path, "input"), Location(path, "output"))
        return first

    def __getitem__(self, number: int) -> Location:
        return self.locations[number]

    def __len__(self) -> int:
        return len(self.locations)
