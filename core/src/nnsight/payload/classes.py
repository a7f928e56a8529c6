"""The source of a class: found by its methods, or in its file by its name, and compiled as it is made again."""

from __future__ import annotations

import ast
import linecache
import sys
import types
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import torch

from nnsight.capture.compiler import function_node
from nnsight.capture.verify import differs
from nnsight.payload import library
from nnsight.payload.sources import (
    ALL,
    CHANGED,
    FUTURES,
    NO_SOURCE,
    NoSourceError,
    Source,
    compile_within,
    parse_file,
    parse_source,
    source_lines,
)

_DATA = (type(None), bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, torch.Tensor)


class ClassSource:
    """What is known of a class from its source.

    Args:
        kind: the class.
        source: its text.
        node: the text, parsed.

    Attributes:
        namespace: the globals of its file.
    """

    def __init__(self, kind: type, source: Source, node: ast.ClassDef) -> None:
        self.kind, self.source, self.node = kind, source, node
        self.namespace = _globals_of(kind)
        self._code: types.CodeType | None = None

    def code(self) -> types.CodeType:
        """Return the code that makes the class."""
        if self._code is None:
            self._code = compile_class(self.source, [name for name, _ in self.cells()], self.kind.__qualname__)
        return self._code

    def cells(self) -> list[tuple[str, types.CellType]]:
        """Return the variables of functions around the class that its methods use."""
        found: dict[str, types.CellType] = {}
        for function in functions_of(self.kind):
            if self._is_own(function):
                found.update(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        own = {"__class__", "__classdict__", *(kind.name for kind in getattr(self.node, "type_params", ()))}
        return [(name, cell) for name, cell in found.items() if name not in own]

    def base(self, name: str) -> type | None:
        """Return the base class that the text calls by a name, None where it calls none so."""
        bases = self.kind.__dict__.get("__orig_bases__", self.kind.__bases__)
        if len(bases) == len(self.node.bases):
            for node, base in zip(self.node.bases, bases, strict=True):
                if isinstance(node, ast.Name) and node.id == name:
                    return base  # type: ignore[no-any-return]
        return None

    def values(self) -> Iterator[tuple[str, Any, bool]]:
        """Yield the attributes that may be others than the text says, and whether the text says nothing of them."""
        if issubclass(self.kind, Enum):
            return
        bound, constant = _bound(self.node)
        for name, value in list(vars(self.kind).items()):  # taking an instance apart may add to them
            if name.startswith(("__", "_abc_")):
                continue
            if isinstance(value, _DATA):
                if name not in constant or type(constant[name]) is not type(value) or constant[name] != value:
                    yield name, value, name not in bound
                continue
            function = function_in(value)
            if function is not None:
                is_users = not function.__code__.co_filename.startswith("<") and not library.is_within(function)
                if name not in bound and is_users and not self._is_own(function):
                    yield name, value, True
            elif (name not in bound or name in constant) and not hasattr(type(value), "__get__"):
                yield name, value, name not in bound

    def _is_own(self, function: types.FunctionType) -> bool:
        """Return whether a function is written in the text of the class."""
        code = function.__code__
        first = min([self.node.lineno, *(node.lineno for node in self.node.decorator_list)])
        is_inside = first <= code.co_firstlineno <= (self.node.end_lineno or first)
        return is_inside and code.co_filename == self.source.filename


def class_source(kind: type) -> ClassSource:
    """Return the source of a class.

    Raises:
        NoSourceError: it is not to be had.
    """
    own = [f for f in functions_of(kind) if f.__code__.co_qualname.startswith(f"{kind.__qualname__}.")]
    own = [function for function in own if not function.__code__.co_filename.startswith("<")]
    own = [function for function in own if not library.is_within(function)]  # a base class has put it there
    is_changed = False
    for filename in _files(kind, own):
        lines = source_lines(filename, _globals_of(kind))
        tree = parse_file("".join(lines))
        nodes = [] if tree is None else list(_named(tree, kind.__qualname__.split(".")))
        for node in reversed(nodes):  # where there are several, most often the last one counts
            source = _cut(node, lines, filename, kind, own)
            parsed = parse_source(source)
            assert isinstance(parsed, ast.ClassDef)
            found = ClassSource(kind, source, parsed)
            if _is_it(found, own):
                return found
            is_changed = True
    raise NoSourceError(CHANGED if is_changed else NO_SOURCE)


def compile_class(source: Source, free: Iterable[str], qualname: str) -> types.CodeType:
    """Return the code of a function that makes a class from its source, and returns it.

    Args:
        source: of a class.
        free: the names that it takes from a function around it.
        qualname: its qualified name.

    Raises:
        SyntaxError: the text does not parse.
        LookupError: it is not that of a class.
    """
    node = parse_source(source)
    if not isinstance(node, ast.ClassDef):
        raise LookupError("the source of a class is none")
    place = {"lineno": node.lineno, "col_offset": 0, "end_lineno": node.lineno, "end_col_offset": 0}
    returned = ast.Return(value=ast.Name(node.name, ast.Load(), **place), **place)
    # Where it is defined at the top of its file its name is a global one, for its methods as well.
    first: list[ast.stmt] = [ast.Global(names=[node.name], **place)] if qualname == node.name else []
    make = function_node("make", [], [*first, node, returned], place)
    return compile_within([make], source, list(free), depth=1)


def functions_of(kind: type) -> list[types.FunctionType]:
    """Return the functions that a class has itself, those in properties and the like included."""
    return [function for value in vars(kind).values() if (function := function_in(value)) is not None]


def function_in(value: Any) -> types.FunctionType | None:
    """Return the function that an attribute of a class is made of, None where it is none."""
    for name in ("__func__", "fget", "func"):
        inner = getattr(value, name, None)
        if isinstance(inner, types.FunctionType):
            value = inner
    return value if isinstance(value, types.FunctionType) else None


def named_fields(kind: type) -> tuple[list[str], dict[str, Any]] | None:
    """Return the fields of a class that `collections.namedtuple` has made, and their defaults; None for any other."""
    fields = kind.__dict__.get("_fields")
    if kind.__bases__ != (tuple,) or not isinstance(fields, tuple) or "__annotations__" in kind.__dict__:
        return None
    return list(fields), dict(kind.__dict__.get("_field_defaults", {}))


def _globals_of(kind: type) -> dict[str, Any]:
    module = sys.modules.get(kind.__module__)
    if module is not None:
        return vars(module)
    return next((function.__globals__ for function in functions_of(kind)), {})


def _files(kind: type, own: list[types.FunctionType]) -> Iterator[str]:
    """Yield the files that a class may be from."""
    if own:
        yield own[0].__code__.co_filename
        return
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is not None:
        yield file
    elif kind.__module__ == "__main__":  # the cells of a notebook, the latest first
        yield from reversed([name for name, entry in linecache.cache.items() if len(entry) > 1 and entry[1] is None])
        yield "<string>"


def _named(node: ast.AST, path: list[str]) -> Iterator[ast.ClassDef]:
    """Yield the classes below a node that have a qualified name."""
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _named(inner, path)
        elif inner.name == path[0]:
            if isinstance(inner, ast.ClassDef):
                if len(path) == 1:
                    yield inner
                else:
                    yield from _named(inner, path[1:])
            elif path[1:2] == ["<locals>"]:
                yield from _named(inner, path[2:])


def _cut(node: ast.ClassDef, lines: list[str], filename: str, kind: type, own: list[types.FunctionType]) -> Source:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    text = "".join(lines[first - 1 : node.end_lineno])
    flags = own[0].__code__.co_flags if own else _future_flags(lines)
    futures = tuple(name for name, flag in FUTURES.items() if flags & flag)
    return Source(filename, first, 0, text, "", futures, False)


def _future_flags(lines: list[str]) -> int:
    tree = parse_file("".join(lines))
    found = 0
    for node in [] if tree is None else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            for alias in node.names:
                found |= FUTURES.get(alias.name, 0)
    return found


def _is_it(found: ClassSource, own: list[types.FunctionType]) -> bool:
    """Return whether a text is that of the class: its methods are, and what it binds the class has."""
    if not all(found._is_own(function) for function in own):
        return False
    bound, _ = _bound(found.node)
    if not own and not bound <= {*dir(found.kind), *_annotations(found.kind)}:
        return False
    try:
        compiled: dict[Any, types.CodeType] = {
            (code.co_firstlineno, code.co_name): code for code in codes_in(found.code())
        }
    except SyntaxError:
        return False
    for function in own:
        code = function.__code__
        other = compiled.get((code.co_firstlineno, code.co_name))
        if other is None or differs(code, other, [found.node, ALL]):
            return False
    return True


def _annotations(kind: type) -> Iterable[str]:
    found: dict[str, Any] = getattr(kind, "__annotations__", {})
    return found


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code objects in another one, outer ones first."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from codes_in(constant)


def _bound(node: ast.ClassDef) -> tuple[set[str], dict[str, Any]]:
    """Return the names that the text of a class binds, and the constants among their values."""
    bound: set[str] = set()
    constant: dict[str, Any] = {}
    for statement in node.body:
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(statement.name)
        elif not isinstance(statement, ast.Expr | ast.Pass):
            names = (inner for inner in ast.walk(statement) if isinstance(inner, ast.Name))
            bound |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
        for target in targets:
            bound |= {inner.id for inner in ast.walk(target) if isinstance(inner, ast.Name)}
            if isinstance(target, ast.Name):
                constant.update(_literal(target.id, getattr(statement, "value", None)))
    return bound, constant


def _literal(name: str, node: ast.expr | None) -> dict[str, Any]:
    try:
        return {} if node is None else {name: ast.literal_eval(node)}
    except (ValueError, SyntaxError, TypeError):
        return {}
