"""Functions and classes of the user's files as source, with what their names are bound to, and back.

The text keeps its place in the file, so that tracebacks and warnings from a runner point there. What a function closes
over becomes a global of its own. Decorators of a function are not run again: what is sent is the function itself.
"""

from __future__ import annotations
import __future__ as future

import ast
import builtins
import inspect
import linecache
import sys
import textwrap
import types
from collections.abc import Callable
from typing import Any

_FUTURES = {name: getattr(future, name).compiler_flag for name in future.all_feature_names}


class Unsendable(Exception):  # noqa: N818 - not one that is raised to the user
    """The source of a function or class is not to be had; says why."""


def describe(value: Any, pack: Callable[[str, Any], Any]) -> list[Any]:
    """Return a function or class as data.

    Args:
        value: the function or class.
        pack: makes data of a value, given what to call it.

    Raises:
        Unsendable: it cannot be.
    """
    is_function = isinstance(value, types.FunctionType)
    code = value.__code__ if is_function else None
    if value.__name__ == "<lambda>":
        raise Unsendable("a lambda, which has no text of its own: write it as a `def`")
    try:
        lines, start = inspect.getsourcelines(code or value)
        filename = inspect.getsourcefile(code or value) or "<unknown>"
        (node,) = ast.parse(textwrap.dedent("".join(lines))).body
    except (OSError, TypeError, SyntaxError, ValueError, IndentationError):
        raise Unsendable("a definition whose source is not to be had") from None
    if isinstance(node, ast.AsyncFunctionDef) or not isinstance(node, ast.FunctionDef | ast.ClassDef):
        raise Unsendable("a definition of a kind that cannot be sent")
    if is_function:
        lines, start = lines[node.lineno - 1 :], start + node.lineno - 1
    if any(isinstance(inner, ast.Nonlocal | ast.Global) for inner in ast.walk(node)) and code and code.co_freevars:
        raise Unsendable("a function that binds variables outside of itself")
    scope = _scope(value)
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    if code is not None:
        names &= _names(code)
    bound = {
        name: pack(f"`{name}`, which `{value.__name__}` uses,", scope[name])
        for name in sorted(names)
        if name in scope and getattr(builtins, name, names) is not scope[name]
    }
    flags = code.co_flags if code is not None else 0
    defaults = [
        pack(f"a default of `{value.__name__}`", value.__defaults__ or ()),
        pack(f"a default of `{value.__name__}`", value.__kwdefaults__ or {}),
    ] if is_function else None  # fmt: skip
    return [
        value.__name__, value.__module__ or "", filename, max(start, 1), "".join(lines), bound, defaults,
        [name for name, flag in _FUTURES.items() if flags & flag],
    ]  # fmt: skip


def _scope(value: Any) -> dict[str, Any]:
    """Return what a definition's names may be bound to: its module's globals, what its functions close over."""
    found: dict[str, Any] = {}
    if isinstance(value, types.FunctionType):
        found.update(value.__globals__)
        functions = [value]
    else:
        found.update(getattr(sys.modules.get(value.__module__), "__dict__", {}))
        functions = [inner for inner in vars(value).values() if isinstance(inner, types.FunctionType)]
    for function in functions:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                found[name] = cell.cell_contents
            except ValueError:
                continue  # not bound yet
    if isinstance(value, type):
        found.pop(value.__name__, None)  # it binds that itself
    return found


def _names(code: types.CodeType) -> set[str]:
    """Return the names that code reads from outside of itself, attributes among them."""
    found = {*code.co_names, *code.co_freevars}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


class Definitions:
    """Functions and classes in a runner, each made when it is first needed.

    Args:
        described: what `describe` returned, by key.
        unpack: makes a value of data.
    """

    def __init__(self, described: dict[int, list[Any]], unpack: Callable[[Any], Any]) -> None:
        self._described = described
        self._unpack = unpack
        self._made: dict[int, Any] = {}
        self._pending: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._is_filling = False

    def get(self, key: int) -> Any:
        """Return a function or class. What a function's names are bound to is filled in last: it may be itself."""
        if key not in self._made:
            name, module, filename, line, text, bound, defaults, futures = self._described[key]
            namespace: dict[str, Any] = {"__builtins__": builtins, "__name__": module}
            code = _compile(text, filename, line, futures)
            if defaults is None:
                for other, data in bound.items():
                    namespace[other] = self._unpack(data)
                exec(code, namespace)
                self._made[key] = namespace[name]
            else:
                function = types.FunctionType(_find(code, name), namespace, name)
                self._made[key] = function
                self._pending.append((namespace, bound))
                positional, named = (self._unpack(data) for data in defaults)
                function.__defaults__, function.__kwdefaults__ = positional or None, named or None
        self._fill()
        return self._made[key]

    def _fill(self) -> None:
        if self._is_filling:
            return
        self._is_filling = True
        while self._pending:
            namespace, bound = self._pending.pop()
            for name, data in bound.items():
                namespace[name] = self._unpack(data)
        self._is_filling = False


def _compile(text: str, filename: str, line: int, futures: list[str]) -> types.CodeType:
    """Compile a definition at its place in the file."""
    header = "if True:\n" if text[:1].isspace() else ""
    source = "\n" * (line - 1 - bool(header)) + header + text
    if filename not in linecache.cache:
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    flags = 0
    for name in futures:
        flags |= _FUTURES[name]
    code: types.CodeType = compile(source, filename, "exec", flags, dont_inherit=True)
    return code


def _find(code: types.CodeType, name: str) -> types.CodeType:
    return next(inner for inner in code.co_consts if isinstance(inner, types.CodeType) and inner.co_name == name)
