"""A place in the graph at which a backward pass stands, and what a block sees and changes of the gradients there.

What a block gets are copies: the engine may hand one buffer to several branches, so an edit of the original would
reach gradients that nobody meant. A copy that was changed takes the original's place when the pass goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nnsight.builtin._gradients.lineage import Edge, Layout, layout_at, positions_in
from nnsight.builtin._gradients.reasons import name_of
from nnsight.errors import GradientError

Gradients = tuple[torch.Tensor | None, ...]


class Stand:
    """One node, and the gradients that have arrived at its outputs.

    Attributes:
        node: the node; `gradients` one per output, None where none arrived.
        is_after: whether the node has run already, as it has where a parameter's gradient was accumulated.
    """

    __slots__ = ("_copies", "gradients", "is_after", "node")

    def __init__(self, node: Any, gradients: Gradients, is_after: bool = False) -> None:
        self.node = node
        self.gradients = gradients
        self.is_after = is_after
        self._copies: dict[int, _Copy] = {}

    def read(self, tensor: torch.Tensor, edges: Sequence[Edge], index: int) -> torch.Tensor:
        """Return the gradient of a tensor, to be read or edited; at one stand always the same object.

        Args:
            tensor: the tensor in hand.
            edges: where its gradient can be taken.
            index: which of them this stand is at.

        Raises:
            GradientError: which part of the gradient belongs to the tensor cannot be known.
        """
        return self._copy(tensor, edges, index).part(tensor, edges, index)

    def write(self, tensor: torch.Tensor, edges: Sequence[Edge], index: int, value: object) -> None:
        """Replace the gradient of a tensor.

        Raises:
            GradientError: the value cannot be its gradient.
        """
        _check(value, tensor)
        assert isinstance(value, torch.Tensor)
        copy = self._copy(tensor, edges, index)
        if edges[index].is_own:
            copy.replace(tensor, value)
        else:
            copy.part(tensor, edges, index).copy_(value)

    def leave(self) -> Gradients | None:
        """Return the gradients to go on with; None when the block has changed none."""
        changed = {output: copy.value for output, copy in self._copies.items() if copy.take_in()}
        self._copies = {}
        if not changed:
            return None
        return tuple(changed.get(output, gradient) for output, gradient in enumerate(self.gradients))

    def _copy(self, tensor: torch.Tensor, edges: Sequence[Edge], index: int) -> _Copy:
        output = edges[index].output
        copy = self._copies.get(output)
        if copy is None:
            gradient = self.gradients[output]
            assert gradient is not None
            copy = self._copies[output] = _Copy(gradient, tensor, edges, index)
        return copy


class _Copy:
    """A gradient of which parts may be handed out: as views where it lies in memory as the tensor does."""

    __slots__ = ("_apart", "_layout", "_original", "_parts", "_version", "value")

    def __init__(self, gradient: torch.Tensor, tensor: torch.Tensor, edges: Sequence[Edge], index: int) -> None:
        self._original = gradient
        is_alike = edges[index].is_own and tensor.is_contiguous() and gradient.is_contiguous()
        if is_alike and not gradient.requires_grad:  # the plain case, made short
            self._layout: Layout | None = Layout(tensor.shape, tensor.stride(), int(tensor.storage_offset()))
            self.value = gradient.clone()
        else:
            layout = self._layout = layout_at(tensor, edges, index, gradient)
            self.value = _in_mode_of(gradient, lambda: _lay_out(gradient, layout))
        self._version = self.value._version
        self._parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._apart: list[tuple[torch.Tensor, torch.Tensor, int]] = []  # positions, what was handed out, its version

    def part(self, tensor: torch.Tensor, edges: Sequence[Edge], index: int) -> torch.Tensor:
        known = self._parts.get(id(tensor))
        if known is None:
            known = self._parts[id(tensor)] = tensor, self._make_part(tensor, edges, index)
        return known[1]

    def replace(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        self.value, self._version = value, -1
        self._layout = None
        self._apart = []
        self._parts = {id(tensor): (tensor, value)}

    def take_in(self) -> bool:
        """Put what was handed out apart back in its place; return whether the block has changed anything."""
        for positions, part, version in self._apart:
            if part._version != version:
                flat = self.value.reshape(-1).clone()
                flat[positions] = part.reshape(-1)
                self.value = flat.view(self.value.shape)
                self._version = -1
        return self.value._version != self._version

    def _make_part(self, tensor: torch.Tensor, edges: Sequence[Edge], index: int) -> torch.Tensor:
        if edges[index].is_own:
            return self.value
        layout = self._layout
        if layout is not None and layout_at(tensor, edges, index, self._original) == layout:
            offset = int(tensor.storage_offset()) - layout.offset + int(self.value.storage_offset())
            return self.value.as_strided(tensor.shape, tensor.stride(), offset)
        positions = positions_in(tensor, edges, index) if tensor.grad_fn is not None else None
        if positions is None:
            raise GradientError(
                f"Which part of the gradient of shape {tuple(self._original.shape)} belongs to this view of shape "
                f"{tuple(tensor.shape)} cannot be told. Ask for the gradient of the whole value, and take the same "
                "view of that."
            )
        part = self.value.reshape(-1)[positions].view(tensor.shape)
        self._apart.append((positions, part, part._version))
        return part


def _lay_out(gradient: torch.Tensor, layout: Layout | None) -> torch.Tensor:
    """Return a copy of a gradient that lies in memory as its tensor does."""
    if layout is None or gradient.layout != torch.strided:
        return gradient.clone()
    if gradient.stride() == layout.stride:
        return gradient.clone(memory_format=torch.preserve_format)
    return torch.empty_strided(layout.size, layout.stride, dtype=gradient.dtype, device=gradient.device).copy_(gradient)


def _in_mode_of(gradient: torch.Tensor, make: Any) -> torch.Tensor:
    """Make a copy with a graph of its own where the gradient has one (`create_graph`), whatever the block has set."""
    copy: torch.Tensor
    if gradient.requires_grad and not torch.is_grad_enabled():
        with torch.enable_grad():
            copy = make()
    else:
        copy = make()
    return copy


def _check(value: object, tensor: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor):
        given = "None" if value is None else f"a {type(value).__name__}"
        raise GradientError(
            f"{given} was assigned to the gradient of {name_of(tensor)}; it takes a tensor of its shape. For no "
            "gradient at all assign zeros: `torch.zeros_like(t)`."
        )
    if value.shape != tensor.shape:
        raise GradientError(
            f"A tensor of shape {tuple(value.shape)} was assigned to the gradient of {name_of(tensor)}, which has "
            f"shape {tuple(tensor.shape)}. A gradient has the shape of its tensor."
        )
    if value.dtype != tensor.dtype or value.device != tensor.device:
        raise GradientError(
            f"A tensor of {value.dtype} on {value.device} was assigned to the gradient of {name_of(tensor)}, which is "
            f"{tensor.dtype} on {tensor.device}. Convert it first: `value.to(t)`."
        )
