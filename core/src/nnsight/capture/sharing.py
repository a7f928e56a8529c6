"""The variables that a block shares with functions outside of it: both must use the one cell that there is."""

from __future__ import annotations

import ast
import dis
from collections.abc import Callable, Iterator
from types import CodeType
from typing import TYPE_CHECKING

from nnsight.capture.verify import operations, variables

if TYPE_CHECKING:
    from nnsight.capture.compiler import Block


def shared_names(
    code: CodeType, block: Block, around: Callable[[], ast.AST | None], shared: frozenset[str] | None
) -> frozenset[str]:
    """Return the names whose one cell must be used: those that functions outside the block share with it.

    A variable that such a function only reads, and the block does not bind, is taken at its value on entry: a loop's
    turns stay apart. Functions in another captured block are none of them: they share that block's own variables.
    """
    if not code.co_cellvars and not code.co_freevars:
        return frozenset()
    free, own = frozenset(code.co_freevars), frozenset(code.co_cellvars)
    if shared is not None:
        free, own = free & shared, own | free - shared
    live = block.names & free
    apart: list[range] | None = None
    for inner in _functions_in(code):
        known = block.names & frozenset(inner.co_freevars) & own
        used = {name for name in known if name in block.bound or _stores(inner, name)}
        if used:
            if apart is None:
                apart = [_lines_of(block.node), *_captured_lines(around(), block)]
            if not any(inner.co_firstlineno in lines for lines in apart):
                live |= used
    return live


#: The methods whose blocks are always captured.
_CAPTURING = frozenset({"invoke", "edit"})


def _captured_lines(around: ast.AST | None, block: Block) -> Iterator[range]:
    """Yield the lines of the other blocks in a function that are captured: those opened as this one is, and invokes."""
    capturing = _CAPTURING | {_opener(block.node.items[block.item])} - {""}
    for node in () if around is None else ast.walk(around):
        if isinstance(node, ast.With) and any(_opener(item) in capturing for item in node.items):
            lines = _lines_of(node)
            if block.node.lineno not in lines:
                yield lines


def _opener(item: ast.withitem) -> str:
    """Return the name of the method that opens a block: `invoke` for `tracer.invoke(x)`; '' if there is none."""
    called = item.context_expr
    while isinstance(called, ast.Call | ast.Subscript):
        called = called.func if isinstance(called, ast.Call) else called.value
    return called.attr if isinstance(called, ast.Attribute) else ""


def _lines_of(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


#: What runs where it stands, so that no block can call it.
_AT_ONCE = ("<listcomp>", "<setcomp>", "<dictcomp>")


def _functions_in(code: CodeType) -> Iterator[CodeType]:
    """Yield the functions that are made in code, those in its comprehensions included."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_name in _AT_ONCE:
                yield from _functions_in(constant)
            else:
                yield constant


def _stores(code: CodeType, name: str) -> bool:
    """Return whether a function, or one inside it, binds a variable of the function around it."""
    if name not in code.co_freevars:
        return False
    number, binding = variables(code).index(name), (dis.opmap["STORE_DEREF"], dis.opmap["DELETE_DEREF"])
    if any(op in binding and argument == number for op, argument in operations(code)):
        return True
    return any(_stores(inner, name) for inner in code.co_consts if isinstance(inner, CodeType))
