"""Whether the source found is the source of the running code: both as bytecode, instruction by instruction.

How a name is stored (fast, cell, global) depends on the function around the block, so instructions are compared by
what they do to which name or constant, in their order and at their place. Statements that a test runner rewrites
(`assert`) are passed over.
"""

from __future__ import annotations

import ast
import dis
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from types import CodeType
from typing import Any

Place = tuple[int, int]  # line, column
Step = tuple[Any, ...]

_IGNORED = (
    "CACHE", "RESUME", "NOP", "PUSH_NULL", "PRECALL", "MAKE_CELL", "COPY_FREE_VARS", "JUMP_FORWARD", "JUMP_BACKWARD",
    "JUMP_BACKWARD_NO_INTERRUPT", "COPY", "SWAP", "LOAD_FAST_AND_CLEAR", "RETURN_VALUE", "POP_TOP", "PRINT_EXPR",
    "LOAD_LOCALS", "LOAD_CLOSURE",
)  # fmt: skip
_PRINT = 1  # the argument of CALL_INTRINSIC_1 that shows an expression at a prompt (3.12)
_PLAIN: tuple[str, Any] = ("", None)
_CLOSURE = 8  # the flag of MAKE_FUNCTION for a function with free variables


def differs(running: CodeType, compiled: CodeType, parts: Sequence[ast.AST]) -> bool:
    """Return whether running code does something else than compiled source, where the source has `parts`."""
    places = [part.context_expr if isinstance(part, ast.withitem) else part for part in parts]
    start = min((part.lineno, part.col_offset) for part in places)  # type: ignore[attr-defined]
    end = max((part.end_lineno, part.end_col_offset) for part in places)  # type: ignore[attr-defined]
    found, expected = _steps(running, start, end), _steps(compiled, start, end)
    if found == expected:
        return False
    asserts = {
        line
        for part in parts
        for inner in ast.walk(part)
        if isinstance(inner, ast.Assert)
        for line in range(inner.lineno, (inner.end_lineno or inner.lineno) + 1)
    }
    if asserts:
        found = [step for step in found if step[0] not in asserts]
        expected = [step for step in expected if step[0] not in asserts]
    if not expected or len(found) % len(expected):
        return found != expected
    # Where Python puts the rarely used parts of a statement depends on what is around it, and it compiles a `finally`
    # once for every way into it. What it does with one line is done in order.
    times = len(found) // len(expected)
    return _by_line(found) != {line: steps * times for line, steps in _by_line(expected).items()}


def _by_line(steps: list[Step]) -> dict[int, list[Step]]:
    lines: dict[int, list[Step]] = {}
    for step in steps:
        lines.setdefault(step[0], []).append(step)
    return lines


def operations(code: CodeType) -> Iterator[tuple[int, int]]:
    """Yield opcode and argument of every instruction, caches included and `EXTENDED_ARG` folded in."""
    raw, extended = code.co_code, 0
    for index in range(0, len(raw), 2):
        argument = extended << 8 | raw[index + 1]
        extended = argument if raw[index] == dis.EXTENDED_ARG else 0
        yield raw[index], argument


def variables(code: CodeType) -> list[str]:
    """Return the names of a code object's own variables, in the order in which instructions number them."""
    own = code.co_varnames
    return [*own, *(name for name in code.co_cellvars if name not in own), *code.co_freevars]


def _steps(code: CodeType, start: Place, end: Place) -> list[Step]:
    """Return what the instructions between two places do, in a form that does not depend on how names are stored."""
    found: list[Step] = []
    kinds, closures, extended_arg = _kinds(), _closures(), dis.EXTENDED_ARG
    local, cells, names = variables(code), code.co_cellvars, code.co_names
    first_cell, first, last = len(code.co_varnames), start[0], end[0]
    window, extended, is_closed = _window(code, first, last), 0, False
    raw = code.co_code[2 * window.start : 2 * window.stop]
    positions = islice(code.co_positions(), window.start, window.stop)
    for op, low, (line, _, column, _) in zip(raw[::2], raw[1::2], positions, strict=True):
        if not op or line is None or not first <= line <= last:  # 0 is CACHE
            continue
        argument = extended << 8 | low
        if op == extended_arg:
            extended = argument
            continue
        extended = 0
        if column is None:
            continue
        if line == first and column < start[1]:
            continue
        kind, what = kinds.get(op, _PLAIN)
        was_closed = is_closed
        is_closed = op in closures and (kind == "ignored" or argument >= first_cell or local[argument] in cells)
        if is_closed or kind == "ignored" or (was_closed and kind == "tuple"):
            continue
        if kind == "local":
            found.append((line, what, local[argument]))
        elif kind == "attribute":
            found.append((line, column, what[0], names[argument >> what[1]]))
        elif kind == "constant":
            found += _constant(code, argument, (line, column, what))
        elif kind == "global":
            found.append((line, what, names[argument >> 1]))
        elif kind == "name":
            found.append((line, what, names[argument]))
            if names[argument] == "__static_attributes__":
                del found[-2:]  # a set of names, in the order of this process's hashes
        elif kind == "pair":
            found += [(line, word, local[n]) for word, n in zip(what, (argument >> 4, argument & 15), strict=True)]
        elif kind == "jump":
            found.append((line, column, what))
        elif kind != "intrinsic" or argument != _PRINT:
            flags = argument & ~_CLOSURE if kind == "function" else argument
            if kind != "function attribute" or flags != _CLOSURE:
                found.append((line, column, op, flags))
    return found


def _window(code: CodeType, first: int, last: int) -> range:
    """Return the instructions among which are all of some lines: a function may be long, and its block short."""
    inside = [(start, end) for start, end, line in code.co_lines() if line is not None and first <= line <= last]
    return range(inside[0][0] // 2, inside[-1][1] // 2) if inside else range(0)


def _constant(code: CodeType, index: int, step: Step) -> list[Step]:
    value = code.co_consts[index]
    if isinstance(value, CodeType):
        return [(*step, value.co_name), *_steps(value, (0, 0), (sys.maxsize, 0))]
    if value == code.co_qualname or (step[2] == "RETURN" and value is None):
        return []  # a class knows where it was defined; a function that ends returns None
    return [(*step, _key(value))]


def _key(value: object) -> Any:
    """Return what tells constants apart: 1, 1.0, True and -0.0 among them."""
    if isinstance(value, tuple):
        return tuple(map(_key, value))
    if isinstance(value, frozenset):
        return "frozenset", sorted(map(repr, value))
    return type(value).__name__, repr(value)


@cache
def _closures() -> set[int]:
    """Return the opcodes that load a cell itself, to make a function of it (a `LOAD_FAST` from 3.13 on)."""
    return {dis.opmap["LOAD_CLOSURE" if sys.version_info < (3, 13) else "LOAD_FAST"]}


@cache
def _kinds() -> dict[int, tuple[str, Any]]:
    """Return what is special about opcodes: how their argument is read, and what they are taken for."""
    kinds: dict[int, tuple[str, Any]] = {}
    for name, op in dis.opmap.items():
        words = [word for word in name.split("_") if word in ("LOAD", "STORE", "DELETE")]
        if name in _IGNORED:
            kinds[op] = "ignored", None
        elif len(words) == 2:
            kinds[op] = "pair", words
        elif op in dis.haslocal or op in dis.hasfree:
            kinds[op] = "local", words[0] if words else name
        elif name == "LOAD_GLOBAL":
            kinds[op] = "global", "LOAD"
        elif name.endswith(("_NAME", "_GLOBAL", "_OR_GLOBALS")) and words:
            kinds[op] = "name", words[0]
        elif op in dis.hasname:
            kinds[op] = "attribute", _attribute(name)
        elif op in dis.hasconst:
            kinds[op] = "constant", "RETURN" if name == "RETURN_CONST" else "LOAD"
        elif op in dis.hasjrel or op in dis.hasjabs:
            kinds[op] = "jump", name.replace("_BACKWARD", "").replace("_FORWARD", "")
    for name, kind in (
        ("BUILD_TUPLE", "tuple"), ("MAKE_FUNCTION", "function"), ("SET_FUNCTION_ATTRIBUTE", "function attribute"),
        ("CALL_INTRINSIC_1", "intrinsic"),
    ):  # fmt: skip
        if name in dis.opmap:
            kinds[dis.opmap[name]] = kind, None
    return kinds


def _attribute(name: str) -> tuple[str, int]:
    """Return what an instruction on an attribute is taken for, and by how many flags its argument is shifted."""
    if name in ("LOAD_METHOD", "LOAD_ATTR"):  # which of the two depends on whether the module imports the name
        return "LOAD_ATTR", 1 if name == "LOAD_ATTR" and sys.version_info >= (3, 12) else 0
    return name, 2 if name == "LOAD_SUPER_ATTR" else 0
