"""Whether a call is the direct item of a `with` statement, known from the bytecode that follows it."""

from __future__ import annotations

import dis
import sys
import weakref
from types import CodeType, FrameType

_known: dict[int, tuple[weakref.ref[CodeType], dict[int, bool]]] = {}
_ENTER = ("BEFORE_WITH",) if sys.version_info < (3, 14) else ("COPY", "LOAD_SPECIAL")


def is_with_item(frame: FrameType) -> bool:
    """Return whether the call that `frame` is making now is what a `with` statement will enter.

    `with f():` is; `g = f()`, `with h(f()):` and a `with` line whose body calls `f` are not.
    """
    code, position = frame.f_code, frame.f_lasti
    entry = _known.get(id(code))
    if entry is None or entry[0]() is not code:
        key = id(code)
        entry = _known[key] = (weakref.ref(code, lambda _: _known.pop(key, None)), {})
    answer = entry[1].get(position)
    if answer is None:
        answer = entry[1][position] = _look(code, position)
    return answer


def _look(code: CodeType, position: int) -> bool:
    following = [step.opname for step in dis.get_instructions(code) if step.offset > position and step.opname != "CACHE"]
    return tuple(following[: len(_ENTER)]) == _ENTER
