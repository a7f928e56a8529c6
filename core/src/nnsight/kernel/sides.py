"""Carriers: what runs one side of a conversation, and how it hands over to the other.

Whoever drives calls `resume`, which returns when what is carried has called `pause` or has ended. The model of a run
is always carried. An inline block drives it; a captured block is carried itself, and driven by the model.
`GreenletCarrier` switches stacks within one thread, `ThreadCarrier` does the same with locks where greenlets are not
safe (see `guard.py`).
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
import threading
from collections.abc import Callable
from contextvars import Context
from typing import Any, Protocol

from greenlet import error as GreenletError  # noqa: N812 - it is a class
from greenlet import getcurrent, greenlet

from nnsight.kernel import guard
from nnsight.kernel.ambient import State, inherited, lend, probe, process_state, restore, restore_process_state

Job = Callable[[], None]
_get_ident = threading.get_ident


class Unwind(BaseException):
    """Raised in a carried side to take it down: its `finally` blocks run, nobody should swallow it."""


class Carrier(Protocol):
    """Runs a job that can stop half-way."""

    thread: int  # the thread that the job runs in

    @property
    def has_ended(self) -> bool:
        """Whether the job has come to its end, by itself or by an interrupt of what carries it."""

    def resume(self) -> None:
        """Run the job until it pauses or ends. Called by the driver."""

    def pause(self) -> None:
        """Hand back to the driver until it resumes. Called by the job; raises `Unwind` when it is taken down."""

    def unwind(self) -> None:
        """Raise `Unwind` where the job is paused; return when it has paused again or ended."""

    def abandon(self) -> None:
        """Leave the unwinding to the job's own thread."""


class _Idle:
    """What one thread has left to do, and its idle workers. They refer to nothing; making one costs a trace."""

    def __init__(self) -> None:
        # Apart, because a new greenlet goes on counting the depth of recursion of whoever starts it: a worker that
        # was made for a block, deep in a model, must not carry the next model.
        self.models: list[_Worker] = []
        self.blocks: list[_Worker] = []
        self.abandoned: list[GreenletCarrier] = []

    def take_down(self) -> None:
        """Unwind what other threads have abandoned here."""
        while self.abandoned:
            self.abandoned.pop().unwind()

    def __del__(self) -> None:
        # The thread ends. Where it has ended before, nobody can do it any more.
        with contextlib.suppress(ValueError, GreenletError):
            self.take_down()


class _Local(threading.local):
    def __init__(self) -> None:
        self.idle = _Idle()


_POOL_SIZE = 64
_local = _Local()


class _Worker(greenlet):
    """A greenlet that runs one job after another."""

    job: Job | None = None
    home: _Idle | None = None  # where it goes when idle

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
            home, self.home = self.home, None
            if not is_lasting or home is None:
                return
            resting = home.models if parent is not None and parent.parent is None else home.blocks
            if len(resting) >= _POOL_SIZE:
                return
            resting.append(self)
            del home, resting
            assert parent is not None
            parent.switch()
            del parent


class GreenletCarrier:
    """Runs a job in a greenlet of the driver's thread, and keeps torch's ambient state apart.

    Args:
        job: what to run.
        context: its contextvars.
        state: the ambient state that it starts with.
        is_model: whether the model is carried, and not a block: inference mode is the model's on both sides.
    """

    __slots__ = ("_context", "_driver", "_is_model", "_job", "_state", "_switch", "_worker", "pause", "thread")

    # The `switch` of the driver and of the worker: no call of ours in between.
    pause: Callable[[], Any]
    _switch: Callable[[], Any]

    def __init__(self, job: Job, context: Context, state: State, is_model: bool) -> None:
        self.thread = _get_ident()
        self._job: Job | None = job
        self._context: Context | None = context
        self._state = inherited(state) if is_model else state
        self._is_model = is_model
        self._worker: _Worker | None = None
        self._driver: greenlet | None = None

    def resume(self) -> None:
        worker = self._worker
        if worker is None:
            worker = self._start()
        driver = getcurrent()
        if driver is not self._driver:
            self._drive(worker, driver)
        mine = probe()
        if mine is not self._state:
            restore(self._state, mine, lend=not self._is_model)
        self._switch()
        now = self._state = probe()
        if now is not mine:
            restore(mine, now, lend=self._is_model)

    @property
    def has_ended(self) -> bool:
        return self._job is None or (self._worker is not None and bool(self._worker.dead))

    def _drive(self, worker: greenlet, driver: greenlet) -> None:
        """Let the job hand back to another greenlet from now on."""
        self._driver = worker.parent = driver
        self.pause = driver.switch

    def unwind(self) -> None:
        worker = self._worker
        if worker is None or self._job is None or sys.is_finalizing():  # nobody can switch when Python ends
            return
        if self._context is not None or worker.dead:  # interrupted before it began
            if not worker.dead:
                worker.gr_context = None
            worker.job = self._job = self._worker = self._context = None
            return
        self._drive(worker, getcurrent())
        mine = probe()
        restore(self._state, mine, lend=not self._is_model)
        worker.throw(Unwind)
        now = self._state = probe()
        restore(mine, now, lend=self._is_model)

    def abandon(self) -> None:
        if self._worker is not None and self._worker.home is not None:
            home, self._worker.home = self._worker.home, None
            home.abandoned.append(self)

    def _start(self) -> _Worker:
        _check_thread(self.thread)
        home = _local.idle
        home.take_down()
        resting = home.models if self._is_model else home.blocks
        worker = resting.pop() if resting else _Worker()
        while worker.dead:  # an interrupt came to it between its job and its rest
            worker = resting.pop() if resting else _Worker()
        self._worker = worker
        self._switch = worker.switch
        worker.home = home
        worker.gr_context = self._context
        worker.job = self._work
        return worker

    def _work(self) -> None:
        assert self._job is not None
        self._context = None
        try:
            self._job()
        finally:
            # An idle worker must not keep the run's context, and so the run, alive.
            getcurrent().gr_context = None
            self._job = self._worker = None
            del self._switch


class ThreadCarrier:
    """Runs a job in a thread of its own. Torch's ambient state is per thread but for inference mode, which is lent."""

    @property
    def has_ended(self) -> bool:
        return self._job is None

    def __init__(self, job: Job, context: Context, state: State, is_model: bool) -> None:
        self.thread = 0
        self._job: Job | None = job
        self._context: Context | None = context
        self._state = inherited(state) if is_model else state
        self._is_model = is_model
        self._model_state: State = True
        self._process_state = process_state()
        self._thread = threading.Thread(target=self._work, name="nnsight-carrier", daemon=True)
        self._job_turn, self._driver_turn = threading.Lock(), threading.Lock()
        self._job_turn.acquire()
        self._driver_turn.acquire()
        self._is_closing = False
        self._owner = _get_ident()
        #: Given an interrupt that came to the driver while the job was running, to raise it there; when the job has
        #: handed back given None, and returns the interrupt if it was not raised.
        self.on_interrupt: Callable[[BaseException | None], BaseException | None] | None = None

    def resume(self) -> None:
        _check_thread(self._owner if self._is_model else _get_ident())
        self._hand_over()

    def _hand_over(self) -> None:
        before = process_state()
        interrupt: BaseException | None = None
        if not self._is_model:
            self._model_state = probe()
        if self._thread.ident is None:
            self._thread.start()
        done: list[Any] = []
        try:
            # Called from C, so that no interrupt comes in between, and `done` says how far it went.
            done.extend(map(operator.call, (self._job_turn.release, self._driver_turn.acquire)))  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001 - raised again once both sides are where they should be
            interrupt = error
            if len(done) == 1:  # the job is running: without threads it would have been interrupted
                if self.on_interrupt is not None:
                    self.on_interrupt(error)
                self._driver_turn.acquire()
                if self.on_interrupt is not None:
                    interrupt = self.on_interrupt(None)
        if self._job is None:
            self._thread.join()
        restore_process_state(before)
        if self._is_model:
            lend(self._model_state)
        if interrupt is not None:
            raise interrupt

    def pause(self) -> None:
        _check_thread(self.thread)
        before = process_state()
        if self._is_model:
            self._model_state = probe()
        self._driver_turn.release()
        self._job_turn.acquire()
        restore_process_state(before)
        if not self._is_model:
            lend(self._model_state)
        if self._is_closing:
            raise Unwind

    def unwind(self) -> None:
        if self._thread.ident is None:  # interrupted before it began, or while it did
            self._job = None
            self._job_turn.release()
        elif self._job is not None and not sys.is_finalizing():
            self._is_closing = True
            self._hand_over()

    def abandon(self) -> None:
        self.unwind()

    def _work(self) -> None:
        self.thread = _get_ident()
        self._job_turn.acquire()
        context, job = self._context, self._job
        if context is None or job is None:
            return
        self._context = None
        restore(self._state, probe())
        restore_process_state(self._process_state)
        if not self._is_model:
            lend(self._model_state)
        try:
            if not self._is_closing:
                context.run(job)
        finally:
            self._model_state = True
            # A mode left on this thread would be dropped when the thread is gone, maybe after Python is: that aborts.
            restore(True, probe())
            self._job = None
            self._driver_turn.release()


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
