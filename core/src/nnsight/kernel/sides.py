"""Carriers: what runs one side of a conversation, and how it hands over to the other.

Whoever drives calls `resume`, which returns when what is carried has called `pause` or has ended. The model of a run
is always carried. An inline block drives it; a captured block is carried itself, and driven by the model.
`GreenletCarrier` switches stacks within one thread, `ThreadCarrier` does the same with locks where greenlets are not
safe (see `guard.py`).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any, Protocol

from greenlet import getcurrent, greenlet

from nnsight.kernel import guard
from nnsight.kernel.ambient import State, inference_scope, probe, restore

Job = Callable[[], None]
_get_ident = threading.get_ident


class Unwind(BaseException):
    """Raised in a carried side to take it down: its `finally` blocks run, nobody should swallow it."""


class Carrier(Protocol):
    """Runs a job that can stop half-way."""

    thread: int  # the thread that the job runs in

    def resume(self) -> None:
        """Run the job until it pauses or ends. Called by the driver."""

    def pause(self) -> None:
        """Hand back to the driver until it resumes. Called by the job; raises `Unwind` when it is taken down."""

    def unwind(self) -> None:
        """Raise `Unwind` where the job is paused; return when it has paused again or ended."""

    def abandon(self) -> None:
        """Leave the unwinding to the job's own thread."""


class _Pool(threading.local):
    """Idle workers of one thread. They refer to nothing; making one costs more than a trace may."""

    def __init__(self) -> None:
        self.idle: list[_Worker] = []


_POOL_SIZE = 64
_pool = _Pool()
_abandoned: dict[int, list[GreenletCarrier]] = {}


class _Worker(greenlet):
    """A greenlet that runs one job after another."""

    job: Job | None = None

    def run(self) -> None:
        while True:
            job, self.job = self.job, None
            if job is None:
                return
            job()
            del job
            parent = self.parent
            # An idle worker is parked in a switch, and so keeps alive whom it has handed back to. Only what refers to
            # nothing in its turn may be kept that way; to anybody else the worker hands back by ending.
            is_lasting = parent is not None and (parent.parent is None or isinstance(parent, _Worker))
            if not is_lasting or len(_pool.idle) >= _POOL_SIZE:
                return
            _pool.idle.append(self)
            assert parent is not None
            parent.switch()
            del parent


class GreenletCarrier:
    """Runs a job in a greenlet of the driver's thread, and keeps torch's ambient state apart.

    Args:
        job: what to run.
        context: its contextvars.
        state: the ambient state that it starts with.
        is_model: whether the model is carried: inference mode then is its own, else it is the driver's.
    """

    __slots__ = ("_context", "_driver", "_is_model", "_job", "_lift", "_state", "_worker", "pause", "thread")

    pause: Callable[[], Any]  # the `switch` of the driver: no call of ours in between

    def __init__(self, job: Job, context: Context, state: State, is_model: bool) -> None:
        self.thread = _get_ident()
        self._job: Job | None = job
        self._context: Context | None = context
        self._state = state
        self._is_model = is_model
        self._worker: _Worker | None = None
        self._driver: greenlet | None = None
        self._lift: Any = None

    def resume(self) -> None:
        worker = self._worker
        if worker is None:
            worker = self._start()
        driver = getcurrent()
        if driver is not self._driver:
            self._drive(worker, driver)
        mine = probe()
        if mine is self._state and self._lift is None:
            worker.switch()
        else:
            self._switch_state(mine, worker.switch)
            return
        now = self._state = probe()
        if now is not mine:
            self._take_back(mine, now)

    def _drive(self, worker: greenlet, driver: greenlet) -> None:
        """Let the job hand back to another greenlet from now on."""
        self._driver = worker.parent = driver
        self.pause = driver.switch

    def unwind(self) -> None:
        worker = self._worker
        if worker is None or self._job is None or sys.is_finalizing():  # nobody can switch when Python ends
            return
        self._drive(worker, getcurrent())
        self._switch_state(probe(), lambda: worker.throw(Unwind))

    def abandon(self) -> None:
        if self._worker is not None and self._job is not None:
            _abandoned.setdefault(self.thread, []).append(self)

    def _switch_state(self, mine: State, switch: Callable[[], Any]) -> None:
        """Switch with the job's ambient state in place of the driver's."""
        self._lift = None  # where the job had opened an inference scope, it holds again
        state = self._state
        scope = inference_scope(state, mine) if self._is_model else None
        restore(state, probe())
        switch()
        now = self._state = probe()
        if scope is not None:
            del scope
            now = probe()
        self._take_back(mine, now)

    def _take_back(self, mine: State, now: State) -> None:
        """Give the driver its ambient state back. An inference scope that a block left open is lifted meanwhile."""
        if not self._is_model:
            self._lift = inference_scope(mine, now)
        restore(mine, probe())

    def _start(self) -> _Worker:
        if _abandoned:
            for carrier in _abandoned.pop(self.thread, ()):
                carrier.unwind()
        idle = _pool.idle
        worker = self._worker = idle.pop() if idle else _Worker()
        worker.gr_context = self._context
        self._context = None
        worker.job = self._work
        return worker

    def _work(self) -> None:
        assert self._job is not None
        try:
            self._job()
        finally:
            # An idle worker must not keep the run's context, and so the run, alive.
            getcurrent().gr_context = None
            self._job = self._worker = None


class ThreadCarrier:
    """Runs a job in a thread of its own. Torch's ambient state is per thread, so only inference mode is passed on."""

    def __init__(self, job: Job, context: Context, state: State, is_model: bool) -> None:
        self.thread = 0
        self._job: Job | None = job
        self._context = context
        self._state = state
        self._is_model = is_model
        self._job_turn = threading.Semaphore(0)
        self._driver_turn = threading.Semaphore(0)
        self._is_closing = False
        self._scope: Any = None
        self._owner = _get_ident()

    def resume(self) -> None:
        _check_thread(self._owner if self._is_model else _get_ident())
        self._scope = None
        if self.thread:
            self._job_turn.release()
        else:
            self._start()
        try:
            self._driver_turn.acquire()
        except BaseException:  # an interrupt: the job must not go on beside the driver
            self._is_closing = True
            self._driver_turn.acquire()
            self.unwind()
            raise
        if self._is_model and self._job is not None:
            self._scope = inference_scope(self._state, probe())

    def pause(self) -> None:
        _check_thread(self.thread)
        self._state = probe()
        self._driver_turn.release()
        self._job_turn.acquire()
        if self._is_closing:
            raise Unwind

    def unwind(self) -> None:
        self._scope = None
        if self.thread and self._job is not None:
            self._is_closing = True
            self._job_turn.release()
            self._driver_turn.acquire()

    def abandon(self) -> None:
        self.unwind()

    def _start(self) -> None:
        started = threading.Event()
        context, job, state = self._context, self._job, self._state
        assert job is not None
        inference = probe() if not self._is_model else state

        def work() -> None:
            self.thread = _get_ident()
            started.set()
            scope = inference_scope(inference, probe())
            restore(state, probe())
            try:
                context.run(job)
            finally:
                del scope
                self._job = None
                self._driver_turn.release()

        threading.Thread(target=work, name="nnsight-carrier", daemon=True).start()
        started.wait()


def _check_thread(owner: int) -> None:
    """Refuse what greenlets refuse by themselves: to hand over from a thread that has no part in it."""
    if _get_ident() != owner:
        raise RuntimeError("handed over from a thread that has no part in this run")


def make_carrier(job: Job, context: Context, state: State, is_model: bool) -> Carrier:
    """Return what carries a job: a greenlet where that is safe, else a thread."""
    global _kind
    if _kind is None:
        is_safe = os.environ.get("NNSIGHT_MODEL_SIDE") != "thread" and guard.install()
        _kind = GreenletCarrier if is_safe else ThreadCarrier
    return _kind(job, context, state, is_model)


_kind: type[GreenletCarrier] | type[ThreadCarrier] | None = None
