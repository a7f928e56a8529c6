"""The block's graph of gradients where it meets the model's: `edges` has the other side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nnsight_ndif.errors import NotInRunnerError

Pull = Callable[[int, torch.Tensor], list[torch.Tensor | None]]


class Pins:
    """Where the model's graph goes on from the block's: each stands for a tensor as it was at one time.

    Args:
        pull: asks the model for the gradients before a tensor of its, given the tensor's key and its own gradient.
    """

    def __init__(self, pull: Pull) -> None:
        self._pull = pull
        self._pins: dict[int, torch.Tensor] = {}
        self._last = 0

    def connect(self, tensor: torch.Tensor, key: int, before: list[int]) -> torch.Tensor:
        """Return a tensor that the model has shown, with its history there."""
        with torch.enable_grad():
            anchor = torch.empty(0, requires_grad=True)
            shown: torch.Tensor = _Shown.apply([tensor], self._pull, key, anchor, *[self._pins[k] for k in before])  # type: ignore[no-untyped-call]
        return shown

    def pin(self, tensor: torch.Tensor, key: int | None = None) -> int:
        """Keep a tensor's history of now under a key; a new, negative one where none is given."""
        if key is None:
            self._last -= 1
            key = self._last
        with torch.enable_grad():
            self._pins[key] = _Pin.apply(tensor)  # type: ignore[no-untyped-call]
        return key


class _Pin(torch.autograd.Function):
    """Has a tensor's shape and history, and no memory."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty(()).expand(tensor.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient


class _Shown(torch.autograd.Function):
    """A tensor that the model has computed from pinned ones."""

    @staticmethod
    def forward(ctx: Any, given: list[torch.Tensor], pull: Pull, key: int, *before: torch.Tensor) -> torch.Tensor:
        ctx.pull, ctx.key = pull, key
        return given[0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NotInRunnerError("Second derivatives (`create_graph=True`) do not pass from a runner to the model.")
        return (None, None, None, None, *ctx.pull(ctx.key, gradient.contiguous()))
