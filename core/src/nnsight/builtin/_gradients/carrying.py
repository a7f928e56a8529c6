"""What carries a backward pass that stops half-way: a greenlet of the block's own thread where that is safe.

The autograd engine keeps its queue per thread, and whoever runs a pass within another one takes both from it: the inner
one must be through before the outer one goes on. A plain `backward()` in the block always is, another traced one need
not be. So at most one pass stands still in a thread; while it does, and wherever the engine would put back what the
block has set in between, a pass has a thread of its own (`thread.py`), which costs it the caches of the processor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import Context
from functools import cache
from threading import get_ident
from typing import Protocol

import torch

from nnsight.builtin._gradients import interception, thread
from nnsight.errors import TracerStateError
from nnsight.kernel import guard
from nnsight.kernel.ambient import State
from nnsight.kernel.sides import GreenletCarrier, Job

_CHANGED = (
    "This backward pass cannot go on here: {why} began after it had stopped at the last gradient, in the same thread, "
    "and has not ended. {remedy}"
)
_TASK, _PROFILER, _LEVEL = range(3)
_REASONS = {
    _TASK: ("another one, which the model or a hook runs,", "Ask for the gradient before or after that."),
    _PROFILER: ("a profiler", "Start the profiler before the `with` of the backward pass, or end it first."),
    _LEVEL: ("a transform of `torch.func`", "Ask for the gradient outside of it and pass the value in."),
}

_task = interception.current_task
_profiler: Callable[[], bool] = torch._C._autograd._profiler_enabled
_level: Callable[[], int | None] = torch._C._functorch.maybe_current_level
_IDLE = (-1, False, None)


class Carrier(Protocol):
    """Runs a pass that can stop half-way."""

    @property
    def is_running(self) -> bool:
        """Whether there is a job that has not ended."""

    def start(self, job: Job, context: Context, state: State) -> None:
        """Run a job until it pauses or ends, with these contextvars and this ambient state."""

    def resume(self) -> None:
        """Let the job go on until it pauses again or ends."""

    def pause(self) -> None:
        """Hand back until resumed. Called by the job; raises `Unwind` when it is taken down."""

    def unwind(self) -> None:
        """Raise `Unwind` where the job has paused, and let it end."""

    def give_back(self) -> None:
        """End: nobody will resume the job any more."""

    def can_end_here(self) -> bool:
        """Whether the calling thread may resume the job."""


class Switched:
    """Carries a pass in a greenlet of the thread that starts it."""

    __slots__ = ("_carrier", "_found")

    def __init__(self) -> None:
        self._carrier: GreenletCarrier | None = None
        self._found: tuple[int, bool, int | None] = _IDLE

    @property
    def is_running(self) -> bool:
        return self._carrier is not None and not self._carrier.has_ended

    def start(self, job: Job, context: Context, state: State) -> None:
        self._carrier = GreenletCarrier(job, context, state, is_model=True)
        self.resume()

    def resume(self) -> None:
        carrier = self._carrier
        assert carrier is not None
        found = (_task(), _profiler(), _level())
        if found != self._found:
            raise _changed(self._found, found)
        interception.step_aside(carrier.thread)
        try:
            carrier.resume()
        finally:
            self._come_back(carrier)

    def _come_back(self, carrier: GreenletCarrier) -> None:
        interception.come_back(carrier.thread, None if carrier.has_ended else self._found[_TASK])

    def pause(self) -> None:
        assert self._carrier is not None
        self._found = (_task(), _profiler(), _level())
        self._carrier.pause()

    def unwind(self) -> None:
        carrier = self._carrier
        if carrier is None or carrier.has_ended:
            return
        # Unwound before a pass that began later, it would be what torch takes for running when that one ends.
        if self.can_end_here() and _task() == self._found[_TASK]:
            interception.step_aside(carrier.thread)
            try:
                carrier.unwind()
            finally:
                self._come_back(carrier)
        else:
            carrier.abandon()

    def give_back(self) -> None:
        self._carrier = None

    def can_end_here(self) -> bool:
        return not self.is_running or (self._carrier is not None and self._carrier.thread == get_ident())


def make(has_inputs: bool) -> Carrier:
    """Return what is to carry a new pass.

    Args:
        has_inputs: whether the pass is limited to some `inputs`: while it stands still torch would refuse reentrant
            checkpoints to any other pass in its thread.
    """
    if not has_inputs and (_task(), _profiler(), _level()) == _IDLE and _is_safe():
        return Switched()
    return thread.borrow()


@cache
def _is_safe() -> bool:
    """Return whether greenlets can be used, and no device has threads that would run the passes of others meanwhile."""
    if os.environ.get("NNSIGHT_MODEL_SIDE") == "thread" or torch.accelerator.is_available():
        return False
    return guard.install()


def _changed(before: tuple[int, bool, int | None], now: tuple[int, bool, int | None]) -> TracerStateError:
    index = next(index for index, (one, other) in enumerate(zip(before, now, strict=True)) if one != other)
    why, remedy = _REASONS[index]
    return TracerStateError(_CHANGED.format(why=why, remedy=remedy))
