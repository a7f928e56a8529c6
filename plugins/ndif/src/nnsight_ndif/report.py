"""Exceptions as data, and back: class, arguments, notes, causes, and the lines of the user's files they came through.

An exception gets its own class back where that is known here: one of Python's, of this library's, or one that a loaded
module of the program defines. It is made without calling its `__init__`. Its traceback shows the lines that the block
had in the user's files.
"""

from __future__ import annotations

import ast
import sys
import traceback
from types import CodeType, TracebackType
from typing import Any

from nnsight_ndif.errors import FrameError, RemoteBlockError

_MAX_LINES = 50
_MAX_CHAIN = 8
_MAX_TEXT = 100_000

_KINDS: tuple[Any, ...] = (bool, int, float, str, bytes, type(None))

Described = list[Any]


def describe(error: BaseException, is_ours: Any = None, depth: int = 0) -> Described:
    """Return an exception as data.

    Args:
        error: the exception.
        is_ours: called with the name of a file; its lines are left out when that returns True.
        depth: how many exceptions this one is the cause of.
    """
    kind = type(error)
    lines = [
        [frame.filename, frame.lineno or 0, frame.name]
        for frame in traceback.extract_tb(error.__traceback__)
        if is_ours is None or not is_ours(frame.filename)
    ]
    cause = error.__cause__
    context = None if error.__suppress_context__ else error.__context__
    known = cause or context
    chained = describe(known, is_ours, depth + 1) if known is not None and depth < _MAX_CHAIN else None
    return [
        kind.__module__, kind.__qualname__, [_plain(argument) for argument in _arguments(error)], _text(error),
        [str(note)[:_MAX_TEXT] for note in getattr(error, "__notes__", ())], lines[-_MAX_LINES:], cause is not None,
        chained,
    ]  # fmt: skip


def rebuild(data: Any, depth: int = 0) -> BaseException:
    """Return the exception that `describe` made data of.

    Raises:
        FrameError: the data is malformed.
    """
    match data:
        case [str(module), str(name), list(args), str(text), list(notes), list(lines), bool(is_cause), chained]:
            pass
        case _:
            raise FrameError("an exception in a message is malformed")
    kind = _class(module, name)
    if kind is None:
        error: BaseException = RemoteBlockError(f"{module}.{name}: {text}" if module != "builtins" else text)
    else:
        error = _make(kind, args)
        if _text(error) != text:  # its own `__str__` needs what `__init__` has made
            error = RemoteBlockError(f"{name}: {text}")
    for note in notes:
        error.add_note(str(note))
    if chained is not None and depth < _MAX_CHAIN:
        before = rebuild(chained, depth + 1)
        error.__cause__ = before if is_cause else None
        error.__context__ = before
    return error.with_traceback(_traceback(lines))


def _arguments(error: BaseException) -> tuple[Any, ...]:
    """Return what an exception was made with; instead of an object that is its message, the message."""
    if len(error.args) == 1 and not isinstance(error.args[0], (*_KINDS, tuple)):
        text = _text(error)
        if text == str(error.args[0]):
            return (text,)
    if isinstance(error, OSError) and error.filename is not None:
        return (error.errno, error.strerror, error.filename)
    if len(error.args) == 1 and type(error.args[0]).__module__.partition(".")[0] == "nnsight":
        return (str(error.args[0]),)  # a message that is made when it is read
    return error.args


def _plain(value: Any) -> Any:
    if isinstance(value, _KINDS):
        base = next(kind for kind in _KINDS if isinstance(value, kind))
        plain: Any = value if type(value) is base else base(value)
        if base is int and not -(1 << 63) <= plain < 1 << 63:
            return str(plain)[:100]
        return plain[:_MAX_TEXT] if base in (str, bytes) else plain
    if type(value) is tuple and len(value) < 100:
        return tuple(_plain(item) for item in value)
    try:
        return repr(value)[:1000]
    except Exception:  # noqa: BLE001 - the user's own `__repr__`
        return f"<{type(value).__name__}>"


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_TEXT]
    except Exception:  # noqa: BLE001 - the user's own `__str__`
        return ""


def _class(module: str, name: str) -> Any:
    """Return the class of an exception, if its module is loaded; nothing is imported for it."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)  # not what a module makes when it is asked
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _make(kind: Any, args: list[Any]) -> BaseException:
    """Return an exception with these arguments. Only the `__init__` of Python's own is called."""
    error: BaseException
    if kind.__module__ == "builtins":
        try:
            error = kind(*args)
            return error
        except TypeError:
            pass
    error = kind.__new__(kind, *args)
    error.args = tuple(args)
    return error


def _traceback(lines: list[Any]) -> TracebackType | None:
    """Return a traceback through these lines of files, as Python makes one: nothing else can."""
    found: TracebackType | None = None
    for line in reversed(lines):
        match line:
            case [str(filename), int(number), str(name)] if 0 <= number < 1 << 24:
                found = _entry(filename, number, name, found)
            case _:
                raise FrameError("a traceback in a message is malformed")
    return found


def _entry(filename: str, number: int, name: str, following: TracebackType | None) -> TracebackType | None:
    source = ast.increment_lineno(ast.parse("raise RuntimeError"), max(number, 1) - 1)
    code: CodeType = compile(source, filename.replace("\0", "?"), "exec")
    try:
        exec(code.replace(co_name=name, co_qualname=name), {"__name__": name})
    except RuntimeError as error:
        own = error.__traceback__ and error.__traceback__.tb_next
        if own is not None:
            return TracebackType(following, own.tb_frame, -1, max(number, 1))  # -1: there are no columns
    return following
