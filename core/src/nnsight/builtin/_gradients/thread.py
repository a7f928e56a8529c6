"""Threads that run a backward pass half-way.

The autograd engine keeps its queue per thread: two passes parked on one thread would run each other's hooks. In a
thread of its own, which hands over by locks, a pass can stop whatever runs in the thread that waits for it.
"""

from __future__ import annotations

import operator
import os
import sys
import threading
from contextvars import Context
from functools import cache

import torch

from nnsight.kernel.ambient import State, probe, restore
from nnsight.kernel.sides import Job, Unwind

_KEPT = 8
_idle: list[Worker] = []


class Worker:
    """A thread that runs one job after another; idle ones refer to nothing.

    Attributes:
        is_running: whether there is a job that has not ended.
    """

    __slots__ = ("_back", "_is_unwinding", "_job", "_turn", "is_running")

    def __init__(self) -> None:
        self._job: tuple[Job, Context, State] | None = None
        self._turn, self._back = threading.Lock(), threading.Lock()
        self._turn.acquire()
        self._back.acquire()
        self.is_running = self._is_unwinding = False
        threading.Thread(target=self._loop, name="nnsight-backward", daemon=True).start()

    def start(self, job: Job, context: Context, state: State) -> None:
        """Run a job until it pauses or ends, with these contextvars and this ambient state."""
        self._job = job, context, state
        self.is_running, self._is_unwinding = True, False
        self.resume()

    def resume(self) -> None:
        """Let the job go on until it pauses again or ends."""
        done: list[None] = []
        try:
            # Called from C, so that no interrupt comes in between, and `done` says how far it went.
            done.extend(map(operator.call, (self._turn.release, self._back.acquire)))  # type: ignore[arg-type]
        except BaseException:
            if len(done) == 1:  # an interrupt: the pass ends at our next hook, or when it is through
                self._is_unwinding = True
                self._back.acquire()
            raise

    def pause(self) -> None:
        """Hand back until resumed. Called by the job; raises `Unwind` when it is taken down."""
        if not self._is_unwinding:
            self._back.release()
            self._turn.acquire()
        if self._is_unwinding:
            raise Unwind

    def unwind(self) -> None:
        """Raise `Unwind` where the job has paused, and let it end."""
        if self.is_running and not sys.is_finalizing():  # no other thread runs any more when Python ends
            self._is_unwinding = True
            self.resume()

    def give_back(self) -> None:
        """Let the thread be used again, or end."""
        if sys.is_finalizing():
            return
        if self.is_running:  # an interrupt came while the job was taken down: it ends by itself, for nobody
            self._is_unwinding = True
            self._turn.release()
        elif len(_idle) < _KEPT:
            _idle.append(self)
        else:
            self._turn.release()

    def can_end_here(self) -> bool:
        """Return True: any thread may resume the job."""
        return True

    def _loop(self) -> None:
        torch._C._set_multithreading_enabled(False)
        while True:
            self._turn.acquire()
            job, self._job = self._job, None
            if job is None:
                return
            try:
                _work(*job)
            finally:
                del job
                self.is_running = False
                self._back.release()


def _work(job: Job, context: Context, state: State) -> None:
    before = probe()
    try:
        if state is not before:
            restore(state, before)
        context.run(job)
    finally:
        now = probe()
        if now is not before:
            restore(before, now)


def borrow() -> Worker:
    """Return an idle thread, or a new one."""
    try:
        return _idle.pop()
    except IndexError:
        _forget_after_fork()
        return Worker()


@cache
def _forget_after_fork() -> None:
    """See to it that a forked process, in which these threads do not live on, makes its own."""
    os.register_at_fork(after_in_child=_idle.clear)
