"""Transports under test, and what the programs of their suite share.

One list of programs is run over every transport, and what each must give is worked out in plain torch. A program opens
its block with two items in one header, so that it can be captured where it stands:

    with self.transport.around(model.trace) as run, run(x) as tracer:
        ...
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nnsight.testing._plain import Change, Recording, record
from nnsight.testing._suite import Suite
from nnsight.testing.tiny import Net, Repeats, Stepping, Structured, rows, seeded
from nnsight.tracing.model import NNsight


@dataclass(frozen=True)
class Transport:
    """A way for a block to get to where it runs.

    Attributes:
        name: what it is called in reports.
        options: the keyword arguments that choose it: `{"remote": "local"}`, `{"backend": mine}`. None is the
            caller's own frame.
        is_invoked: whether the block is that of an invoke, which is captured and run in this process.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    is_invoked: bool = False

    @contextlib.contextmanager
    def around(self, method: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
        """Yield what opens the block of a program: called as the method would be, in the same header."""
        opened = functools.partial(method, **self.options) if self.options else method
        if not self.is_invoked:
            yield opened
            return
        with opened() as tracer:

            def invoke(*args: Any, **kwargs: Any) -> Any:
                invoker = tracer.invoke(*args, **kwargs)
                invoker._entered = lambda: tracer  # a program finds the tracer under the name that `as` binds
                return invoker

            yield invoke


#: The block runs in the caller's own frame.
INLINE = Transport("inline")
#: The block is captured, and run in this process when it is its turn.
CAPTURED = Transport("captured", is_invoked=True)


class TransportSuite(Suite):
    """What a subclass says: its transport. The rest is shared by the programs."""

    transport: Transport

    def net(self) -> Any:
        """Return a new wrapper of blocks in a row."""
        return NNsight(seeded(Net).eval())

    def structured(self) -> Any:
        """Return a new wrapper of a model with containers between its parts."""
        return NNsight(seeded(_Structured).eval())

    def repeats(self) -> Any:
        """Return a new wrapper of a model that is run in steps."""
        return Repeats(seeded(Stepping).eval())

    def x(self, seed: int = 0) -> torch.Tensor:
        """Return an input of two rows."""
        return rows(seed)

    def plain(self, model: NNsight, x: Any, changes: Mapping[tuple[str, str, int], Change] | None = None) -> Recording:
        """Return what the bare module does, with hooks of torch that change values."""
        return record(model._module, lambda: model._module(x), changes)


class _Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), Structured()

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        hidden: torch.Tensor = self.inner(self.first(x) * scale)
        return hidden
