"""Threads that run a backward pass half-way.

The autograd engine keeps its queue per thread: two passes parked on one thread would run each other's hooks. So each
traced pass has a thread of its own, which hands over by locks, whatever runs in the thread that waits for it.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable
from functools import cache

import torch

from nnsight.kernel.sides import Unwind

Job = Callable[[], None]
_KEPT = 8
_idle: list[Worker] = []


class Worker:
    """A thread that runs one job after another; idle ones refer to nothing.

    Attributes:
        is_running: whether there is a job that has not ended.
    """

    __slots__ = ("_back", "_is_unwinding", "_job", "_turn", "is_running")

    def __init__(self) -> None:
        self._job: Job | None = None
        self._turn, self._back = threading.Lock(), threading.Lock()
        self._turn.acquire()
        self._back.acquire()
        self.is_running = self._is_unwinding = False
        threading.Thread(target=self._loop, name="nnsight-backward", daemon=True).start()

    def start(self, job: Job) -> None:
        """Run a job until it pauses or ends."""
        self._job = job
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
        if self.is_running:
            self._is_unwinding = True
            self.resume()

    def give_back(self) -> None:
        """Let the thread be used again, or end."""
        if self.is_running:  # an interrupt came while the job was taken down: it ends by itself, for nobody
            self._is_unwinding = True
            self._turn.release()
        elif len(_idle) < _KEPT:
            _idle.append(self)
        else:
            self._turn.release()

    def _loop(self) -> None:
        torch._C._set_multithreading_enabled(False)
        while True:
            self._turn.acquire()
            job, self._job = self._job, None
            if job is None:
                return
            try:
                job()
            finally:
                del job
                self.is_running = False
                self._back.release()


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
