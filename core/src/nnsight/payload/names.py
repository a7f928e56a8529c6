"""Which names code looks up outside of itself, and which attributes of a module it uses."""

from __future__ import annotations

import ast
import dis
import types
from collections.abc import Iterable
from functools import cache

from nnsight.capture.percode import PerCode
from nnsight.capture.verify import operations

_OPTIMIZED = 0x1  # the code flag of functions

_known: PerCode[frozenset[str]] = PerCode()


def global_names(code: types.CodeType) -> frozenset[str]:
    """Return the names of globals and builtins that code, and code inside it, reads or binds."""
    known = _known.of(code)
    found = known.get(None)
    if found is None:
        found = known[None] = frozenset(_scan(code))
    return found


def eager_names(code: types.CodeType) -> set[str]:
    """Return the names of globals that running code reads at once, so not those that functions defined in it read."""
    found = _scan(code, is_deep=False)
    for constant in code.co_consts:
        # Class bodies, and comprehensions and lambdas, which most often run where they are written.
        if isinstance(constant, types.CodeType):
            is_class = not constant.co_flags & _OPTIMIZED
            if is_class or constant.co_name.startswith("<"):
                found |= eager_names(constant)
    return found


def _scan(code: types.CodeType, is_deep: bool = True) -> set[str]:
    found: set[str] = set()
    own: set[str] = set()  # what a class body has bound itself before it reads it
    kinds = _kinds()
    for op, argument in operations(code):
        kind = kinds.get(op)
        if kind is None:
            continue
        name = code.co_names[argument >> 1 if kind == "global" else argument]
        if kind == "store":
            own.add(name)
        elif name == "__annotations__":
            continue  # of the class itself
        elif kind != "name" or name not in own:
            found.add(name)
    for constant in code.co_consts if is_deep else ():
        if isinstance(constant, types.CodeType):
            found |= _scan(constant)
    return found


@cache
def _kinds() -> dict[int, str]:
    kinds = {
        "LOAD_GLOBAL": "global", "STORE_GLOBAL": "bound", "DELETE_GLOBAL": "bound", "LOAD_NAME": "name",
        "STORE_NAME": "store", "LOAD_FROM_DICT_OR_GLOBALS": "bound",
    }  # fmt: skip
    return {dis.opmap[name]: kind for name, kind in kinds.items() if name in dis.opmap}


def attributes_of(name: str, nodes: Iterable[ast.AST]) -> frozenset[str] | None:
    """Return the dotted attributes that code takes from a name, the longest ones; None where it is used otherwise.

    Args:
        name: what stands before the first dot.
        nodes: the code.
    """
    found: set[str] = set()
    todo: list[ast.AST] = list(nodes)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Attribute):
            chain = _chain(node)
            if chain and chain[0] == name:
                found.add(".".join(chain[1:]))
                continue
        elif isinstance(node, ast.Name) and node.id == name:
            return None
        todo.extend(ast.iter_child_nodes(node))
    return frozenset(found)


def _chain(node: ast.expr) -> list[str]:
    """Return the names of `a.b.c`; nothing for what is no such chain."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [*parts, node.id][::-1] if isinstance(node, ast.Name) else []
