"""The model's graph of gradients as a block sees it: the tensors it was shown, and what lies between them.

A block's maths has a graph of its own, in its process. Where it needs the gradient of a tensor that it was shown, it
sends that tensor's cotangent here, and gets those of the tensors that the tensor was computed from: only back to what
the block was shown or has written itself, and only by ways that pass no other such tensor, since the block's own graph
adds those up. The gradients of the weights are left as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nnsight import InputError, payload
from nnsight_ndif.errors import FrameError


class Edges:
    """The edges of the model's graph that a block knows of, by key: shown ones positive, its own negative."""

    def __init__(self) -> None:
        self._edges: dict[int, GradientEdge] = {}
        self._ends: list[int] = []
        self._kinds: dict[int, tuple[torch.Size, torch.dtype]] = {}
        self._before: dict[int, list[int]] = {}
        self._keys: dict[tuple[int, int], int] = {}
        self._last = 0

    def show(self, tensor: torch.Tensor) -> list[Any] | None:
        """Return what a block needs to know of a tensor's history: its key, and those of the edges before it."""
        if not tensor.requires_grad:
            return None
        self._last += 1
        edge = get_gradient_edge(tensor)
        known = self._keys.get(_place(edge))
        self._before[self._last] = before = [known] if known is not None else self._find_before(edge)
        self._add(self._last, edge, tensor)
        return [self._last, before]

    def tie(self, leaf: torch.Tensor, key: Any, is_end: bool = True) -> None:
        """Give a key of the block's own to a leaf that stands for what it computed.

        Args:
            leaf: the leaf.
            key: the key.
            is_end: whether gradients end there once the block is over; else the leaf is one of the model's side.

        Raises:
            FrameError: the key is none, or has been given.
        """
        if type(key) is not int or key >= 0 or key in self._edges:
            raise FrameError("a message gives a tensor a key that cannot be one")
        self._add(key, get_gradient_edge(leaf), leaf)
        if is_end:
            self._ends.append(key)

    def pull(self, key: Any, gradient: Any) -> list[torch.Tensor | None]:
        """Return the gradients of the edges before a tensor, given the tensor's own.

        Raises:
            FrameError: there is no such tensor.
            InputError: the gradient does not fit it.
        """
        if type(key) is not int or key not in self._before or not isinstance(gradient, torch.Tensor):
            raise FrameError("a message asks for gradients of what was not shown")
        shape, dtype = self._kinds[key]
        if gradient.shape != shape or gradient.dtype != dtype:
            raise InputError(
                f"A gradient of shape {tuple(gradient.shape)} and {gradient.dtype} was given for a tensor of shape "
                f"{tuple(shape)} and {dtype}."
            )
        edges = [self._edges[other] for other in self._before[key]]
        if not edges:
            return []
        handles = [edge.node.register_prehook(_stop_at(edge.output_nr)) for edge in edges] if len(edges) > 1 else []
        try:
            return list(
                torch.autograd.grad((self._edges[key],), edges, (gradient,), retain_graph=True, allow_unused=True)
            )
        finally:
            for handle in handles:
                handle.remove()

    def close(self) -> None:
        """The block is over: a pass that comes to what it has computed ends there from now on, and says so."""
        for key in self._ends:
            self._edges[key].node.register_prehook(_tell)

    def _add(self, key: int, edge: GradientEdge, tensor: torch.Tensor) -> None:
        self._edges[key] = edge  # which keeps the node, so that its `id` is not another one's
        self._kinds[key] = tensor.shape, tensor.dtype
        self._keys[_place(edge)] = key

    def _find_before(self, edge: GradientEdge) -> list[int]:
        """Return the keys of the edges that an edge is computed from, with none of them on the way."""
        found: dict[int, None] = {}
        seen, todo = {edge.node}, [edge.node]
        while todo:
            for node, number in todo.pop().next_functions:
                if node is None:
                    continue
                key = self._keys.get((id(node), number))
                if key is not None:
                    found[key] = None
                elif node not in seen:
                    seen.add(node)
                    todo.append(node)
        return list(found)


def _tell(gradients: tuple[torch.Tensor | None, ...]) -> None:
    if any(gradient is not None for gradient in gradients):
        payload.warn_of_end()


def _place(edge: GradientEdge) -> tuple[int, int]:
    return id(edge.node), edge.output_nr


def _stop_at(number: int) -> Any:
    """Return a hook that lets nothing of one output's gradient pass on; it has been taken before."""

    def stop(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        own = gradients[number]
        return (*gradients[:number], None if own is None else torch.zeros_like(own), *gradients[number + 1 :])

    return stop
