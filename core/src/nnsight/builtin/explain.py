"""`nnsight.explain()`: what the last trace asked for, in order, with what it got.

Recording is off until it is asked for, and costs nothing then: `explain.on()` registers a plugin that gives the seats
of blocks another class (`recording.py`), `explain.off()` takes it away.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, TextIO

_NOTHING = (
    "Nothing was recorded: requests are recorded only when that was asked for before the trace, because it makes each "
    "some {cost} dearer. Call nnsight.explain.on(), or set NNSIGHT_EXPLAIN=1, and run the trace again."
)
_COST = "10 us"
_LONGEST = 80  # characters of an error in a row of the table


@dataclass
class Request:
    """One thing that a block asked for.

    Attributes:
        kind: "read", "write", "skip", "call" (of a module, on the model side), "wait" (for a step or for other blocks)
            or "stop".
        location: where in the model, `model.transformer.h.3.output`; what was called or waited for; "gradient of `h`",
            with the tensor as the line called it.
        occurrence: which visit of it; None where there is no such thing.
        block: the block that asked: "block", or "invoke at file:line" and the like.
        where: the user's file and line.
        at: seconds since the trace was opened.
        seconds: how long it took, with what the model ran meanwhile.
        got: the value in few words, such as `float32[1, 10, 768]`; what was given, for a write or skip.
        shape: its shape, if it is a tensor.
        dtype: its dtype, if it is a tensor.
        is_edited: whether the block went on to change the value in place.
        error: what was raised instead, "" for nothing.
    """

    kind: str
    location: str
    occurrence: int | None
    block: str
    where: str
    at: float
    seconds: float = 0.0
    got: str = ""
    shape: tuple[int, ...] | None = None
    dtype: Any = None
    is_edited: bool = False
    error: str = ""


@dataclass
class Explanation:
    """What one trace asked for.

    Attributes:
        method: what opened it: "trace", "generate", "scan", ...
        where: the user's file and line at which it was opened.
        requests: what its blocks asked for, in order.
        error: what ended it, "" for nothing.
        seconds: how long it was open; None while it is.
    """

    method: str = ""
    where: str = ""
    requests: list[Request] = field(default_factory=list)
    error: str = ""
    seconds: float | None = None
    began: float = field(default_factory=time.perf_counter, repr=False)

    def __str__(self) -> str:
        if not self.method:
            return _NOTHING.format(cost=_COST)
        count = len(self.requests)
        how = "failed" if self.error else "finished"
        how = "not over" if self.seconds is None else f"{how} after {_ms(self.seconds)}"
        lines = [f"{self.method} at {self.where}: {count} request{'s' * (count != 1)}, {how}"]
        rows = [_row(request) for request in self.requests]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
        lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"  ended by {self.error}"] if self.error else lines)


def _row(request: Request) -> list[str]:
    location = request.location
    if request.occurrence is not None:
        location += f" (occurrence {request.occurrence})"
    got = f"raised {shorten(request.error, _LONGEST, placeholder=' ...')}" if request.error else request.got
    got += ", edited in place" * request.is_edited
    return [_ms(request.at), request.block, request.kind, location, got, f"in {_ms(request.seconds)}", request.where]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


class Explain:
    """The last trace of this thread that was recorded, and the switch of recording."""

    def __init__(self) -> None:
        self._last = threading.local()
        self._lock = threading.Lock()
        self._recorder: Any = None

    def __call__(self, file: TextIO | None = None) -> Explanation:
        """Print what the last trace of this thread asked for, finished or failed.

        Args:
            file: where to; standard output by default.

        Returns:
            The same as an object. Without any request if nothing was recorded, and then it says how to record.
        """
        last: Explanation = getattr(self._last, "explanation", None) or Explanation()
        print(last, file=file or sys.stdout)
        return last

    def on(self) -> None:
        """Record, from the next trace on, what blocks ask for. No value is kept, only what it looks like."""
        from nnsight.builtin.backward import backward  # lazy: as below
        from nnsight.builtin.recording import RecordedBackward, Recorder  # lazy: needed by nobody who does not record
        from nnsight.plugins import register

        with self._lock:
            if self._recorder is None:
                self._recorder = Recorder(self._keep)
                register(self._recorder, "explain")
                backward.kind = RecordedBackward

    def off(self) -> None:
        """Record no more. What was recorded last can still be shown."""
        from nnsight.builtin._gradients.session import Backward  # lazy: as above
        from nnsight.builtin.backward import backward
        from nnsight.plugins import unregister

        with self._lock:
            recorder, self._recorder = self._recorder, None
            if recorder is not None:
                unregister(recorder)
                backward.kind = Backward

    @property
    def is_on(self) -> bool:
        """Whether traces are recorded."""
        return self._recorder is not None

    def _keep(self, explanation: Explanation) -> None:
        self._last.explanation = explanation


explain = Explain()
