"""The source of a function: found, parsed, and made sure to be what is running."""

from __future__ import annotations
import __future__

import ast
import dis
import inspect
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from nnsight_source.errors import SourceError

Function = ast.FunctionDef | ast.AsyncFunctionDef

#: Before the names of what the rewritten code uses: no program can have names like these.
MARK = "@"

_NO_SOURCE = (
    "The source of `{name}` is unavailable: {why}, so there is nothing to look into. What goes in and comes out of it "
    "can still be read and changed where it is called."
)
_CHANGED = (
    "The source of `{name}` at {file}:{line} is not what is running: the file has changed since it was imported, or "
    "an import hook has changed the code. Reload the module (or restart), so that what runs is what is read."
)
_FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})
_IGNORED = frozenset({
    "CACHE", "RESUME", "NOP", "PUSH_NULL", "PRECALL", "EXTENDED_ARG", "COPY", "SWAP", "LOAD_FAST_AND_CLEAR",
    "RETURN_VALUE", "POP_TOP",
})  # fmt: skip
_SAME_AS = {"LOAD_METHOD": "LOAD_ATTR", "RETURN_CONST": "LOAD_CONST"}
_GLOBAL, _ATTRIBUTE, _CACHE, _MORE = (dis.opmap[name] for name in ("LOAD_GLOBAL", "LOAD_ATTR", "CACHE", "EXTENDED_ARG"))
_LOAD_METHOD = dis.opmap.get("LOAD_METHOD", -1)
_SUPER = dis.opmap.get("LOAD_SUPER_ATTR", -1)  # what `super().x` is, from 3.12 on, unless the module has a `super`
_Span = tuple[tuple[int, int], tuple[int, int]]
_METHOD_BIT = 1 if sys.version_info >= (3, 12) else 0


@dataclass(frozen=True)
class Text:
    """The source of one function.

    Attributes:
        node: its syntax tree, with the line numbers of the file.
        lines: its lines from the `def` on.
    """

    node: Function
    lines: tuple[str, ...]


def no_source(name: str, why: str) -> SourceError:
    """Return the error for a callable that cannot be looked into."""
    return SourceError(_NO_SOURCE.format(name=name, why=why))


def read(function: FunctionType) -> Text:
    """Return the source of a function.

    Raises:
        SourceError: there is none, or it is not what is running.
    """
    code = function.__code__
    name = code.co_qualname
    if any(free.startswith(MARK) for free in code.co_freevars):
        raise SourceError(
            f"`{name}` is defined inside a function that is being looked into: its operations are among those of that "
            "function's `.source`."
        )
    if code.co_name == "<lambda>":
        raise no_source(name, "it is a lambda")
    lines = _lines(code.co_filename, function.__globals__)
    if len(lines) < code.co_firstlineno:
        raise no_source(name, f"no source is kept for {code.co_filename} (code from `exec` or a bare prompt has none)")
    node = _parse(lines, code)
    if node is None or not _is_running(node, code):
        raise SourceError(_CHANGED.format(name=name, file=code.co_filename, line=code.co_firstlineno))
    return Text(node, tuple(line.rstrip("\n") for line in lines[node.lineno - 1 : node.end_lineno]))


def compile_function(node: Function, code: CodeType, own: frozenset[str] = frozenset()) -> CodeType:
    """Compile a function's syntax tree with the flags, the closure and the class of its code.

    Args:
        node: the function; decorators and default values are left out, which belong to where it is defined.
        code: what the same function is compiled to already.
        own: further names that are to be cells of the closure.
    """
    names = [*(name for name in code.co_freevars if name != "__class__"), *sorted(own)]
    body: list[ast.stmt]
    body = [_definition("factory", _arguments(names), [_bare(node)])]
    owner = _owner(code) or ("Owner" if "__class__" in code.co_freevars else "")
    if owner:
        holder = ast.ClassDef(name=owner, bases=[], keywords=[], body=body, decorator_list=[])
        if sys.version_info >= (3, 12):
            holder.type_params = []
        body = [holder]
    for created in (body[0], body[0].body[0]):  # type: ignore[attr-defined]
        ast.copy_location(created, node)
    imported = [
        ast.Import([ast.alias(name, lineno=1, col_offset=0)], lineno=1, col_offset=0) for name in _imported(code)
    ]
    tree = ast.Module(body=[*imported, *body], type_ignores=[])
    found: CodeType = compile(tree, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    for _ in range(3 if owner else 2):
        found = next(constant for constant in found.co_consts if isinstance(constant, CodeType))
    return _named(found, code.co_name, found.co_qualname, code.co_qualname)


def _imported(code: CodeType) -> set[str]:
    """Return the global names that the module may have imported: how what they hold is called depends on that.

    A method is called in a way of its own, unless it is of a name that the module imports; and so is `super`.
    """
    names, methods = set(), set()
    last, argument = "", 0
    for kind, low in zip(code.co_code[::2], code.co_code[1::2], strict=True):
        argument = argument << 8 | low
        if kind == _GLOBAL:
            last = code.co_names[argument >> 1]
            names.add(last)
        elif kind == _LOAD_METHOD or (kind == _ATTRIBUTE and argument & _METHOD_BIT):
            methods.add(last)
        elif kind == _SUPER:
            methods.add("super")
        if kind not in (_GLOBAL, _CACHE, _MORE):
            last = ""
        if kind != _MORE:
            argument = 0
    found = names - methods
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= _imported(inner)
    return found


def _named(code: CodeType, name: str, old: str, new: str) -> CodeType:
    """Return code with the name that it should have, and what is defined in it named accordingly."""

    def renamed(constant: object) -> object:
        if isinstance(constant, CodeType):
            return _named(constant, constant.co_name, old, new)
        # The body of a class sets `__qualname__`. No other text holds a name like ours.
        is_name = isinstance(constant, str) and constant.startswith(f"{old}.")
        return f"{new}{constant.removeprefix(old)}" if is_name else constant  # type: ignore[attr-defined]

    constants = tuple(map(renamed, code.co_consts))
    return code.replace(co_name=name, co_qualname=new + code.co_qualname.removeprefix(old), co_consts=constants)


def _lines(filename: str, namespace: dict[str, Any]) -> list[str]:
    linecache.checkcache(filename)
    lines = linecache.getlines(filename, namespace)
    if not lines and filename == "<string>" and "-c" in sys.orig_argv:
        lines = sys.orig_argv[sys.orig_argv.index("-c") + 1].splitlines(keepends=True)
    return lines


def _parse(lines: list[str], code: CodeType) -> Function | None:
    """Parse the lines that the code spans; where that is not the whole function, the lines of its block."""
    first = code.co_firstlineno
    node = _parse_lines(lines, first, _last_line(code), code.co_name)
    if node is None:
        length = len(inspect.getblock(lines[first - 1 :]))
        node = _parse_lines(lines, first, first + length - 1, code.co_name)
    return node


def _parse_lines(lines: list[str], first: int, last: int, name: str) -> Function | None:
    text = "".join(lines[first - 1 : last])
    is_indented = text[:1].isspace()
    # Empty lines before it give the tree the line numbers of the file.
    before = "\n" * (first - 2) + "if 1:\n" if is_indented else "\n" * (first - 1)
    try:
        body = ast.parse(before + text).body
    except SyntaxError:
        return None
    if is_indented and isinstance(body[0], ast.If):
        body = body[0].body
    found = body[0] if len(body) == 1 else None
    return found if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef) and found.name == name else None


def _last_line(code: CodeType) -> int:
    last = max((place[1] or 0 for place in code.co_positions()), default=0)
    return max([last, *(_last_line(inner) for inner in code.co_consts if isinstance(inner, CodeType))])


def _owner(code: CodeType) -> str:
    """Return the name of the innermost class around a function, for name mangling; '' when there is none."""
    parts = code.co_qualname.split(".")
    for inner, outer in zip(parts[::-1], parts[-2::-1], strict=False):
        if outer != "<locals>" and inner != "<locals>":
            return outer
    return ""


def _bare(node: Function) -> Function:
    """Return the definition without what is evaluated where it stands: decorators, default values, annotations."""
    given = node.args
    nothing = ast.Constant(value=None, lineno=node.lineno, col_offset=0, end_lineno=node.lineno, end_col_offset=0)

    def plain(argument: ast.arg) -> ast.arg:
        return ast.copy_location(ast.arg(arg=argument.arg), argument)

    signature = ast.arguments(
        posonlyargs=[plain(argument) for argument in given.posonlyargs],
        args=[plain(argument) for argument in given.args],
        vararg=plain(given.vararg) if given.vararg else None,
        kwonlyargs=[plain(argument) for argument in given.kwonlyargs],
        kw_defaults=[None if value is None else nothing for value in given.kw_defaults],
        kwarg=plain(given.kwarg) if given.kwarg else None,
        defaults=[nothing] * len(given.defaults),
    )
    # Not its own name: where it refers to that, it means what is found from where it was defined.
    return ast.copy_location(_definition(MARK + "function", signature, node.body, type(node)), node)


def _definition(
    name: str, signature: ast.arguments, body: list[ast.stmt], kind: type[Function] = ast.FunctionDef
) -> Function:
    node = kind(name=name, args=signature, body=body, decorator_list=[], returns=None)
    if sys.version_info >= (3, 12):
        node.type_params = []
    return node


def _arguments(names: list[str]) -> ast.arguments:
    taken = [ast.arg(arg=name, lineno=1, col_offset=0, end_lineno=1, end_col_offset=0) for name in names]
    return ast.arguments(posonlyargs=[], args=taken, kwonlyargs=[], kw_defaults=[], defaults=[])


def _is_running(node: Function, code: CodeType) -> bool:
    compiled = compile_function(node, code)
    if _is_same(compiled, code):
        return True
    # A test runner rewrites asserts.
    asserts = [_span(inner) for inner in ast.walk(node) if isinstance(inner, ast.Assert)]
    return bool(asserts) and set(_steps(compiled, asserts)) == set(_steps(code, asserts))


def _span(node: ast.Assert) -> _Span:
    return (node.lineno, node.col_offset), (node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)


def _is_same(left: CodeType, right: CodeType) -> bool:
    if left.co_code != right.co_code or left.co_names != right.co_names or left.co_varnames != right.co_varnames:
        return False
    if left.co_cellvars != right.co_cellvars or left.co_freevars != right.co_freevars:
        return False
    if len(left.co_consts) != len(right.co_consts):
        return False
    for one, other in zip(left.co_consts, right.co_consts, strict=True):
        if isinstance(one, CodeType) and isinstance(other, CodeType):
            if not _is_same(one, other):
                return False
        elif type(one) is not type(other) or _shown(one) != _shown(other):
            return False
    return True


def _shown(value: object) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _steps(code: CodeType, asserts: list[_Span]) -> Iterator[tuple[int | None, str, str]]:
    """Yield line, kind and argument of each instruction outside asserts, without what depends on where it stands."""
    for step in dis.get_instructions(code):
        line = None if step.positions is None else step.positions.lineno
        if step.opname in _IGNORED or _is_in(step, asserts):
            continue
        if isinstance(step.argval, CodeType):
            yield from _steps(step.argval, asserts)
        elif "JUMP" in step.opname or step.opname in ("FOR_ITER", "SEND"):
            continue
        else:
            kind = _SAME_AS.get(step.opname, step.opname)
            yield line, kind, step.argrepr if step.opname == "KW_NAMES" else _shown(step.argval)


def _is_in(step: dis.Instruction, spans: list[_Span]) -> bool:
    place = step.positions
    if place is None or place.lineno is None or place.col_offset is None:
        return False
    start = place.lineno, place.col_offset
    return any(first <= start <= last for first, last in spans)
