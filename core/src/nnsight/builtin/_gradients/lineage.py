"""Where the gradient of a tensor can be taken: at its own place in the graph, or at that of what it is a view of.

`h = block.output[0]` is a view that the model never uses, so no gradient reaches it; it reaches the output itself, and
the gradient of the view is the same view of that. Which elements these are is known from strides where the layout of
the whole is known, and otherwise from the graph nodes of the view operations: their derivative, applied to the numbers
1..n in the shape of the view, puts each where it belongs in the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

_DEEPEST = 64  # view operations between a tensor and its base
#: Derivatives of views that keep the order of the elements: of a contiguous base they are contiguous.
_FLAT = frozenset({
    "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward0",
    "SqueezeBackward1", "SqueezeBackward2", "SqueezeBackward3", "AliasBackward0",
})  # fmt: skip


class Edge(NamedTuple):
    """One output of a node of the graph: where a gradient arrives.

    Attributes:
        node: the node; `output` which of its outputs.
        is_own: whether it is the tensor's own, and not that of a value which it is a view of.
    """

    node: Any
    output: int
    is_own: bool = False


class Layout(NamedTuple):
    """How a tensor lies in its storage, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def edge_of(tensor: torch.Tensor) -> Edge | None:
    """Return where the gradient of a tensor itself arrives; None for one that has no place in a graph."""
    node = tensor.grad_fn
    if node is not None:
        return Edge(node, tensor.output_nr, is_own=True)
    with torch.enable_grad():
        viewed = tensor.view_as(tensor).grad_fn
    accumulate = viewed.next_functions[0][0] if viewed is not None else None
    # None for a view taken under no_grad, which requires grad only because its base does.
    return None if accumulate is None else Edge(accumulate, 0, is_own=True)


def edges_of(tensor: torch.Tensor) -> list[Edge]:
    """Return where the gradient of a tensor can be taken, the nearest first; nothing for one without a graph."""
    own = edge_of(tensor) if tensor.requires_grad else None
    edges = [] if own is None else [own]
    base = tensor._base
    if base is None or not base.requires_grad:
        return edges
    end = edge_of(base)
    assert end is not None
    node = tensor.grad_fn
    if own is not None and node is not None:
        chain = [own]
        for _ in range(_DEEPEST):
            parents = node.next_functions  # type: ignore[union-attr]
            if not parents or parents[0][0] is None:
                break
            node, output = parents[0]
            chain.append(Edge(node, output))
            if node is end.node:
                return chain
    # A view taken under no_grad: the graph does not say how it came from its base.
    return [*edges, Edge(end.node, end.output)]


def layout_of(tensor: torch.Tensor) -> Layout | None:
    """Return how a tensor lies in its storage; None when it has gaps or uses an element twice."""
    if torch._debug_has_internal_overlap(tensor) != 0:
        return None
    return Layout(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def layout_at(tensor: torch.Tensor, edges: Sequence[Edge], index: int, gradient: torch.Tensor) -> Layout | None:
    """Return how what `edges[index]` belongs to lies in the storage that it shares with `tensor`; None if unknown.

    Args:
        tensor: the tensor in hand.
        edges: where its gradient can be taken.
        index: which of them is meant.
        gradient: what has arrived there.
    """
    if edges[index].is_own:
        return layout_of(tensor)
    base = tensor._base
    if base is None or base.dtype != tensor.dtype:
        return None
    if index == len(edges) - 1:
        return layout_of(base)
    if base.is_contiguous() and all(edge.node.name() in _FLAT for edge in edges[index:-1]):
        shape = tuple(gradient.shape)
        return Layout(shape, _contiguous(shape), int(base.storage_offset()))
    return None


def positions_in(tensor: torch.Tensor, edges: Sequence[Edge], index: int) -> torch.Tensor | None:
    """Return where each element of a view is in the flattened whole that `edges[index]` belongs to.

    Returns:
        (tensor.numel(),) int64, or None when the nodes between do not only choose and reorder elements.
    """
    count = tensor.numel()
    with torch.no_grad():
        numbers: Any = torch.arange(1, count + 1, device=tensor.device).view(tensor.shape)
        for node, output, _ in edges[:index]:
            metadata = node._input_metadata
            given = [numbers if i == output else None for i in range(len(metadata))]
            try:
                numbers = node(*given)
            except RuntimeError:
                return None
            if isinstance(numbers, tuple):
                numbers = numbers[0]
            if not isinstance(numbers, torch.Tensor) or numbers.dtype != torch.int64:
                return None
        flat = numbers.reshape(-1)
        where = flat.nonzero().reshape(-1)
        found = flat[where]
        if found.numel() != count:
            return None
        order = found.argsort()
        if not torch.equal(found[order], torch.arange(1, count + 1, device=found.device)):
            return None
        return where[order]  # type: ignore[no-any-return]


def is_reachable(root: Any, edges: Sequence[Edge]) -> bool:
    """Return whether any of these edges belongs to the graph below a node."""
    wanted = {edge.node for edge in edges}
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node in wanted:
            return True
        if node in seen:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    return False


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
