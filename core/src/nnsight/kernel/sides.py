"""How the model side is run, and how it and a block hand over to each other.

A `Seat` is a pair of doors: `to_model` is called by a block and returns when the model has handed back, `to_block` is
called by the model and returns when it may go on. The seat of an inline block is the side that carries the model:
`GreenletSide` switches stacks within one thread, `ThreadSide` does the same with locks where greenlets are not safe
(see `guard.py`).
"""

from __future__ import annotations

import os
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
    """Raised in the model side to take it down: its `finally` blocks run, nobody should swallow it."""


class Seat(Protocol):
    """The two doors between a block and the model."""

    def to_model(self) -> None:
        """Let the model run until it hands back. Called by the block."""

    def to_block(self) -> None:
        """Let the block run until it hands back. Called by the model; raises `Unwind` when the run is closing."""


class Side(Seat, Protocol):
    """A seat that carries the model of a run."""

    thread: int  # the thread that the model runs in

    def unwind(self) -> None:
        """Raise `Unwind` where the model is parked; return when it has ended."""

    def abandon(self) -> None:
        """Leave the unwinding to the side's own thread."""


class _Pool(threading.local):
    """Idle workers of one thread. They refer to nothing; making one costs more than a trace may."""

    def __init__(self) -> None:
        self.idle: list[_Worker] = []


_POOL_SIZE = 4
_pool = _Pool()
_abandoned: dict[int, list[GreenletSide]] = {}


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
            # Being parked in `parent.switch` keeps `parent` alive, so only a thread's main greenlet may be returned
            # to that way; to any other the worker returns by ending.
            if parent is None or parent.parent is not None or len(_pool.idle) >= _POOL_SIZE:
                return
            _pool.idle.append(self)
            parent.switch()


class GreenletSide:
    """Runs the model in a greenlet of the block's thread."""

    __slots__ = ("_block", "_context", "_job", "_state", "_worker", "thread")

    def __init__(self, job: Job, context: Context, state: State) -> None:
        self.thread = _get_ident()
        self._job: Job | None = job
        self._context: Context | None = context
        self._state = state
        self._worker: _Worker | None = None
        self._block: greenlet | None = None

    def to_model(self) -> None:
        worker = self._worker
        if worker is None:
            worker = self._start()
        self._block = block = getcurrent()
        if worker.parent is not block:
            worker.parent = block
        mine = probe()
        state = self._state
        if mine is state:
            worker.switch()
        else:
            scope = inference_scope(state, mine)
            restore(state, mine)
            worker.switch()
            if scope is not None:
                self._state = probe()
                del scope
                restore(mine, probe())
                return
        now = self._state = probe()
        if now is not mine:
            restore(mine, now)

    def to_block(self) -> None:
        assert self._block is not None
        self._block.switch()

    def unwind(self) -> None:
        worker = self._worker
        if worker is None or self._job is None:
            return
        self._block = block = getcurrent()
        worker.parent = block
        mine = probe()
        scope = inference_scope(self._state, mine)
        restore(self._state, mine)
        worker.throw(Unwind)
        del scope
        restore(mine, probe())

    def abandon(self) -> None:
        if self._worker is not None and self._job is not None:
            _abandoned.setdefault(self.thread, []).append(self)

    def _start(self) -> _Worker:
        if _abandoned:
            for side in _abandoned.pop(self.thread, ()):
                side.unwind()
        idle = _pool.idle
        worker = self._worker = idle.pop() if idle else _Worker()
        worker.gr_context = self._context
        self._context = None
        worker.job = self._work
        return worker

    def _work(self) -> None:
        job = self._job
        assert job is not None
        try:
            job()
        finally:
            # An idle worker must not keep the run's context, and so the run, alive.
            getcurrent().gr_context = None
            self._job = self._worker = None


class ThreadSide:
    """Runs the model in a thread of its own. Torch's ambient state is per thread, so nothing is swapped."""

    def __init__(self, job: Job, context: Context, state: State) -> None:
        self.thread = 0
        self._job: Job | None = job
        self._context = context
        self._state = state
        self._model_turn = threading.Lock()
        self._block_turn = threading.Lock()
        self._model_turn.acquire()
        self._block_turn.acquire()
        self._is_closing = False
        self._scope: Any = None

    def to_model(self) -> None:
        self._scope = None
        if not self.thread:
            self._start()
        else:
            self._model_turn.release()
        try:
            self._block_turn.acquire()
        except BaseException:  # an interrupt: the model must not go on beside the block
            self._is_closing = True
            self._block_turn.acquire()
            if self._job is not None:
                self._model_turn.release()
                self._block_turn.acquire()
            raise
        self._scope = inference_scope(self._state, probe())

    def to_block(self) -> None:
        self._state = probe()
        self._block_turn.release()
        self._model_turn.acquire()
        if self._is_closing:
            raise Unwind

    def unwind(self) -> None:
        self._scope = None
        if self.thread and self._job is not None:
            self._is_closing = True
            self._model_turn.release()
            self._block_turn.acquire()

    def abandon(self) -> None:
        self.unwind()

    def _start(self) -> None:
        started = threading.Event()
        context, job, state = self._context, self._job, self._state
        assert job is not None

        def work() -> None:
            self.thread = _get_ident()
            started.set()
            scope = inference_scope(state, probe())
            restore(state, probe())
            try:
                context.run(job)
            finally:
                del scope
                self._job = None
                self._state = probe()
                self._block_turn.release()

        threading.Thread(target=work, name="nnsight-model", daemon=True).start()
        started.wait()


def make_side(job: Job, context: Context, state: State) -> Side:
    """Return the side that carries the model: a greenlet where that is safe, else a thread."""
    if os.environ.get("NNSIGHT_MODEL_SIDE") == "thread" or not guard.install():
        return ThreadSide(job, context, state)
    return GreenletSide(job, context, state)
