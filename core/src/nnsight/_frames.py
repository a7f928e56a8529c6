"""Tracebacks as users want to see them: their own frames and the model's, without those of this library.

An error passes through frames of ours on its way to the user's line. Each place at which the library is entered ends
with `except BaseException as error: hide(error); raise`: a bare `raise` adds no entry for the frame that it is in, so
after it the user's frame is the next. `CONFIG.APP.DEBUG` (or `NNSIGHT_DEBUG=1`) leaves everything as it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from itertools import pairwise
from types import FrameType, TracebackType
from typing import ParamSpec, TypeVar

from nnsight._known import KNOWN
from nnsight.config import CONFIG

P = ParamSpec("P")
R = TypeVar("R")

#: The top-level packages whose frames are left out. What a third party registers is not ours: it may be the user's.
_OURS = frozenset({"nnsight", *(f"nnsight_{name}" for name in KNOWN["nnsight"])})
#: Where tests are that a plugin runs: what they do in a block is what users do.
_PROGRAMS = "nnsight.testing."


def hide(error: BaseException) -> None:
    """Take the frames of this library out of the traceback of an error, and of all that it came from."""
    if CONFIG.APP.DEBUG:
        return
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.__traceback__ = _without_ours(one.__traceback__)
        pending += (one.__cause__, one.__context__)
        if isinstance(one, BaseExceptionGroup):
            pending += one.exceptions


def at_users_line(function: Callable[P, R]) -> Callable[P, R]:
    """Let what a function raises, which users call outside of blocks, end at their line."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            hide(error)
            raise

    return called


def _without_ours(traceback: TracebackType | None) -> TracebackType | None:
    kept = []
    while traceback is not None:
        if not _is_ours(traceback.tb_frame):
            kept.append(traceback)
        traceback = traceback.tb_next
    for one, following in pairwise(kept):
        if one.tb_next is not following:
            one.tb_next = following
    if not kept:
        return None
    kept[-1].tb_next = None
    return kept[0]


def users_line() -> str:
    """Return the file and line of the innermost frame on the caller's stack that is not ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    if not isinstance(name, str) or name.startswith(_PROGRAMS):
        return False
    return name.partition(".")[0] in _OURS
