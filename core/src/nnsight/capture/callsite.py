"""Whether a call is the direct item of a `with` statement, known from the bytecode that follows it."""

from __future__ import annotations

import dis
import sys
from types import CodeType, FrameType

from nnsight.capture.percode import PerCode

_known: PerCode[bool] = PerCode()
_ENTER = ("BEFORE_WITH",) if sys.version_info < (3, 14) else ("COPY", "LOAD_SPECIAL")


def is_with_item(frame: FrameType) -> bool:
    """Return whether the call that `frame` is making now is what a `with` statement will enter.

    `with f():` is; `g = f()`, `with h(f()):` and a `with` line whose body calls `f` are not.
    """
    code, position = frame.f_code, frame.f_lasti
    answers = _known.of(code)
    answer = answers.get(position)
    if answer is None:
        answer = answers[position] = _look(code, position)
    return answer


def _look(code: CodeType, position: int) -> bool:
    following = (op for op in code.co_code[position + 2 :: 2] if op != dis.opmap["CACHE"])
    return all(next(following, None) == dis.opmap[name] for name in _ENTER)
