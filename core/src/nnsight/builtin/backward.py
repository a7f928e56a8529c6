"""`with loss.backward():` reads and changes gradients while they flow.

The block runs where it stands. The backward pass has a stack of its own: the first request starts it, each request runs
it to where that gradient arrives, and leaving the block lets it finish. `t.grad` means the gradient in this pass
for any tensor but a parameter, whose `.grad` is the ordinary accumulated one, read once this pass has added to it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from nnsight.builtin._gradients import checkpoint
from nnsight.builtin._gradients.session import Backward
from nnsight.capture.callsite import is_with_item

_plain: Callable[..., Any] | None = None


class TracedBackward:
    """What `tracer.backward` is: the same as `with loss.backward():`, wherever it is called.

    Attributes:
        kind: the class of the blocks that are opened.
    """

    def __init__(self) -> None:
        self.kind = Backward

    def __call__(self, tracer: object, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Backward:
        """Open a traced backward pass, as the method of a tracer; arguments as `open`."""
        return self.open(tensor, *args, **kwargs)

    def open(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Backward:
        """Open a traced backward pass: `with tracer.backward(loss, retain_graph=True):`.

        Args:
            tensor: what backward is called on, any shape that `Tensor.backward` takes.
            *args: for `Tensor.backward`.
            **kwargs: for `Tensor.backward`.
        """
        mount()
        assert _plain is not None
        return self.kind(tensor, _plain, args, kwargs)

    def mount(self) -> None:
        """Let `with loss.backward():` trace, and checkpoints see the edits of a run, from now on."""
        mount()


backward = TracedBackward()


def mount() -> None:
    """Wrap `Tensor.backward` and watch `torch.utils.checkpoint`, once. Elsewhere both do what they always did."""
    global _plain
    if _plain is not None:
        return
    plain = _plain = torch.Tensor.backward

    @functools.wraps(plain)
    def traced_or_plain(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_with_item(sys._getframe(1)):
            return backward.kind(self, plain, args, kwargs)
        return plain(self, *args, **kwargs)  # type: ignore[no-untyped-call]

    torch.Tensor.backward = traced_or_plain  # type: ignore[method-assign]
    checkpoint.mount()
