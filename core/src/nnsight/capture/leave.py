"""Leaving the body of a `with` at the first opcode after `__enter__`, so that nothing of it runs in place."""

from __future__ import annotations

import sys
from types import FrameType, FunctionType, MethodType
from typing import Any


class Leave(BaseException):
    """Carries control from the start of a body to the `__exit__` of its `with`."""


class Leaving:
    """Arranges that a frame raises `Leave` at its next opcode (`arm`), and puts back whatever tracer was there."""

    __slots__ = ("_frame", "_global", "_local", "_opcodes")

    def __init__(self, frame: FrameType) -> None:
        self._frame: FrameType | None = frame
        self._global = sys.gettrace()
        self._local = frame.f_trace
        self._opcodes = frame.f_trace_opcodes

    def arm(self) -> None:
        """Let `Leave` be raised at the frame's next opcode."""
        frame = self._frame
        assert frame is not None
        try:
            frame.f_trace_opcodes = True
            frame.f_trace = _raise_leave
            # A tracer written in C, such as that of coverage, would not look at `f_trace`.
            if not isinstance(self._global, FunctionType | MethodType):
                sys.settrace(_ignore)
        except BaseException:  # an interrupt: there will be no `__exit__`
            self.restore()
            raise

    def restore(self) -> None:
        """Put back what was there. Python drops the tracers when one of them raises, so both are set again."""
        frame, self._frame = self._frame, None
        assert frame is not None
        frame.f_trace_opcodes = self._opcodes
        sys.settrace(self._global)
        if self._local is not None:
            frame.f_trace = self._local
        else:
            del frame.f_trace


def _raise_leave(frame: FrameType, event: str, argument: Any) -> Any:
    if event == "opcode":
        raise Leave
    return _raise_leave


def _ignore(frame: FrameType, event: str, argument: Any) -> None:
    return None
