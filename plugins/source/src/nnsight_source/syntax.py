"""Pieces of syntax that rewritten code is made of, and the names of what is called and bound in it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import TypeVar

from nnsight_source.text import MARK

#: What calls and values pass through, and what stands for brackets, in rewritten code.
CALL, VALUE, GETITEM, SLICE = MARK + "call", MARK + "value", MARK + "getitem", MARK + "slice"

Node = TypeVar("Node", bound=ast.expr | ast.stmt)


def dotted(node: ast.expr) -> str:
    """Return the dotted path that an expression is, "" when it is none."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def called_name(node: ast.expr) -> str:
    """Return the base of the name of a call: the attributes after the last thing that has no name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        names.append(node.id)
    return "_".join(reversed(names)) or "unknown"


def bound_name(node: ast.expr) -> str:
    """Return the base of the name of what is assigned to: an item is named after what it is in, with `item_`."""
    if isinstance(node, ast.Starred):
        return bound_name(node.value)
    if not isinstance(node, ast.Subscript):
        return called_name(node)
    inner: ast.expr = node
    while True:
        if isinstance(inner, ast.Subscript):
            inner = inner.value
        elif isinstance(inner, ast.Call) and len(inner.args) > 1 and dotted(inner.args[1]) == GETITEM:
            inner = inner.args[2]  # a subscript inside, rewritten already
        else:
            break
    return f"item_{called_name(inner)}"


def at(place: ast.expr | ast.stmt, node: Node) -> Node:
    """Return a new node, at the place of another."""
    node.lineno, node.col_offset = place.lineno, place.col_offset
    node.end_lineno, node.end_col_offset = place.end_lineno, place.end_col_offset
    return node


def load(place: ast.expr | ast.stmt, name: str) -> ast.expr:
    """Return the value of a name."""
    return at(place, ast.Name(name, ast.Load()))


def store(place: ast.expr | ast.stmt, name: str) -> ast.expr:
    """Return a name that is assigned to."""
    return at(place, ast.Name(name, ast.Store()))


def call(
    place: ast.expr | ast.stmt, name: str, number: int, args: list[ast.expr], keywords: Sequence[ast.keyword] = ()
) -> ast.expr:
    """Return `name(number, *args, **keywords)`."""
    index = at(place, ast.Constant(value=number))
    return at(place, ast.Call(func=load(place, name), args=[index, *args], keywords=list(keywords)))


def index_of(node: ast.expr) -> ast.expr:
    """Return what a subscript has between its brackets as an expression: `1:n` as `slice(1, n, None)`."""
    if isinstance(node, ast.Slice):
        parts = [part or at(node, ast.Constant(value=None)) for part in (node.lower, node.upper, node.step)]
        return at(node, ast.Call(func=load(node, SLICE), args=parts, keywords=[]))
    if isinstance(node, ast.Tuple):
        return at(node, ast.Tuple([index_of(part) for part in node.elts], ast.Load()))
    return node
