"""In which order a backward pass runs the nodes of a graph, for the requests whose place cannot be told at a glance."""

from __future__ import annotations

import heapq
from typing import Any

ACCUMULATE = "torch::autograd::AccumulateGrad"


class Order:
    """The order in which the engine runs the graph below a node, in one thread.

    The engine runs, of the nodes that have all their gradients, the one with the highest sequence number. The number of
    what accumulates the gradient of a leaf is above all others; among those the order is not known, so it is watched.

    Args:
        root: what the pass begins with.
        here: the node that it stands at.
    """

    def __init__(self, root: Any, here: Any) -> None:
        self._done: set[Any] = set()
        self._handles: list[Any] = []
        self._places = _places(root)
        self._here = self._places.get(here, -1)
        for node, place in self._places.items():
            if node.name() != ACCUMULATE:
                continue
            if place < self._here:
                self._done.add(node)
            else:
                self._handles.append(node.register_hook(_Mark(self._done, node)))

    def is_passed(self, node: Any, here: Any) -> bool:
        """Return whether the pass, standing at `here`, has run a node."""
        if node.name() == ACCUMULATE:
            return node in self._done
        return self._places.get(node, len(self._places)) < self._places.get(here, -1)

    def close(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._places = [], {}
        self._done.clear()


class _Mark:
    __slots__ = ("_done", "_node")

    def __init__(self, done: set[Any], node: Any) -> None:
        self._done = done
        self._node = node

    def __call__(self, *gradients: Any) -> None:
        self._done.add(self._node)
        self._node = None  # the node holds this


def _places(root: Any) -> dict[Any, int]:
    """Return the place of each node in the order."""
    needed: dict[Any, int] = {root: 0}
    todo = [root]
    while todo:
        for parent, _ in todo.pop().next_functions:
            if parent is None:
                continue
            if parent not in needed:
                needed[parent] = 0
                todo.append(parent)
            needed[parent] += 1
    places: dict[Any, int] = {}
    ready = [(-root._sequence_nr(), 0, root)]
    while ready:
        _, _, node = heapq.heappop(ready)
        places[node] = len(places)
        for parent, _ in node.next_functions:
            if parent is not None:
                needed[parent] -= 1
                if not needed[parent]:
                    heapq.heappush(ready, (-parent._sequence_nr(), len(needed) + len(places) + len(ready), parent))
    return places
