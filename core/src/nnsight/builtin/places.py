"""Locations inside a module that a plugin makes, beside the module's own input and output.

A plugin numbers them here, visits them as `make_controller` does or with `Interleaver.visit`, and serves requests with
`seat`. What it puts in place for a run, it takes away when that is closed (`Interleaver.closing`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from nnsight.kernel.location import Explain, Location

if TYPE_CHECKING:
    from nnsight.kernel.envoy import Envoy
    from nnsight.kernel.location import Tree
    from nnsight.kernel.mediator import Mediator


class Places:
    """Locations inside one module. Whoever asks for the same key has the same ones.

    Args:
        envoy: mirrors the module.
        key: what the locations are made for.
        below: for each location its path below the module's, with the dot before it, and its port.
        explain: called with a run and a number when that location was not reached although the module was called;
            returns a sentence that says why, or "".
        given: which of them (counted from 0) passes what an output is made of, where that is not the input before it:
            how the rows of a batch are told from a value that happens to be as long.
    """

    __slots__ = ("_below", "_envoy", "_explain", "_first", "_given", "_key")

    def __init__(
        self,
        envoy: Envoy,
        key: Hashable,
        below: Sequence[tuple[str, str]],
        explain: Explain,
        given: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self._envoy = envoy
        self._key = key
        self._below = below
        self._explain = explain
        self._given = given
        self._first = -1

    def seat(self, port: str) -> tuple[Mediator, int, int]:
        """Return the open block that the calling code is in, and what its run calls these locations.

        Args:
            port: what is requested, for the error.

        Returns:
            The block, the number of the first location (the others follow), the number of the module's input.

        Raises:
            OutsideTraceError: no block of this model is open here.
            WrongThreadError: one is, but in another thread.
        """
        mediator, around = self._envoy._seat(port)
        tree = mediator.tree
        if tree is not self._envoy._tree:
            assert tree is not None
            return mediator, self._reserve(tree, around), around
        return mediator, self.first, around

    @property
    def first(self) -> int:
        """The number of the first location in the envoy's own tree."""
        if self._first < 0:
            self._first = self._reserve(self._envoy._tree, self._envoy._number)
        return self._first

    def _reserve(self, tree: Tree, around: int) -> int:
        path = tree[around].path

        def locations() -> list[Location]:
            new = tuple.__new__  # a third of what the constructor of a named tuple takes, and there may be hundreds
            return [new(Location, (path + name, port)) for name, port in self._below]

        return tree.reserve((path, self._key), locations, around, self._explain, self._given)
