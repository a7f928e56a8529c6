"""`model.iter[...]` and `model.all()`: steps without a tracer at hand, as in edits and in programs written for 0.6."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nnsight.joint.iteration import Iteration, Steps

if TYPE_CHECKING:
    from nnsight.kernel.mediator import Mediator
    from nnsight.tracing.model import Envoy


def iter_steps(envoy: Envoy) -> Steps:
    """Return the steps of the run that the calling code takes part in: `for step in model.iter[:3]:`."""

    def current() -> Mediator:
        return envoy._seat("iter")[0]

    return Steps(current, envoy.root._number)


def all_steps(envoy: Envoy) -> Callable[[], Iteration]:
    """Return the method `model.all()`, every step, as `model.iter[:]`."""
    return lambda: iter_steps(envoy)[:]
