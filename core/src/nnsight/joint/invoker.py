"""`with tracer.invoke(input):`: captures a block, to be run when it is its turn."""

from __future__ import annotations

import sys
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from nnsight._frames import hide
from nnsight.capture.cells import Scope
from nnsight.capture.compiler import read_block
from nnsight.capture.leave import Leave, Leaving
from nnsight.config import CONFIG
from nnsight.joint.captured import CapturedBlock

if TYPE_CHECKING:
    from nnsight.joint.invokes import Invokes
    from nnsight.protocols import Inputs


class Capture:
    """A `with` item whose body is captured instead of run."""

    what = "block"
    _leaving: Leaving | None = None
    _block: CapturedBlock | None = None

    def __enter__(self) -> Any:
        frame = sys._getframe(1)
        try:
            scope = Scope(read_block(frame), frame, self._previous(frame))
            entered = self._bind(scope.block.target, self._entered())
            self._block = CapturedBlock(scope, entered, self.what)
        except BaseException as error:
            hide(error)
            raise
        self._leaving = leaving = Leaving(frame)
        leaving.arm()  # the last call: an interrupt after it would meet `Leave`
        return entered

    if TYPE_CHECKING:

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
        ) -> None: ...
    else:

        def __exit__(self, kind, error, traceback) -> bool:
            leaving, self._leaving = self._leaving, None
            leaving.restore()
            block, self._block = self._block, None
            if kind is not Leave:
                return False
            try:
                self._captured(block)
            except BaseException as raised:
                _forget(raised, error)
                hide(raised)
                raise
            return True

    def take(self, scope: Scope) -> None:
        """Take a block that was sent, as if it were written here and had been entered."""
        entered = self._bind(scope.block.target, self._entered())
        self._captured(CapturedBlock(scope, entered, self.what))

    def _previous(self, frame: FrameType) -> Scope | None:
        """Return the block before this one in the same frame, whose names it may read."""
        return None

    def _entered(self) -> Any:
        """Return what `as` binds."""
        return self

    def _bind(self, target: Any, entered: Any) -> Any:
        """Return what a given target is bound to: a name, a list of targets, or None."""
        return entered

    def _captured(self, block: CapturedBlock) -> None:
        """Take the block that was captured."""
        raise NotImplementedError


def _forget(raised: BaseException, leave: BaseException) -> None:
    """Let a user's exception not be told as one that came while the body was being left."""
    while raised.__context__ is not None and raised.__context__ is not leave:
        raised = raised.__context__
    raised.__context__ = None


class Invoker(Capture):
    """One invoke: what it feeds the model, and its block.

    Args:
        invokes: the invokes of the trace.
        inputs: its input, prepared; None for a block over the whole batch.
    """

    what = "invoke"

    def __init__(self, invokes: Invokes, inputs: Inputs | None) -> None:
        self._invokes = invokes
        self.inputs = inputs

    def take(self, scope: Scope) -> None:
        """Take a block that was sent, as if it were written here and had been entered."""
        entered = self._bind(scope.block.target, self._entered())
        self._captured(CapturedBlock(scope, entered, self.what))

    def _previous(self, frame: FrameType) -> Scope | None:
        if not CONFIG.APP.CROSS_INVOKER:
            return None
        for block, _ in reversed(self._invokes.entries):
            if block.scope.frame is frame:
                return block.scope
        return None

    def _captured(self, block: CapturedBlock) -> None:
        self._invokes.entries.append((block, self.inputs))
