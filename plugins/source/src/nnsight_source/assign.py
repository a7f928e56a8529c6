"""Assignments, rewritten so that each value passes a visit before it is bound.

A single target takes what passes: `x = @value(n, v)`. Several names are bound first, and bound again. Where other
targets are among them, and where a statement reads its target itself (`x[i] += v`), names with an @ hold what is
evaluated, so that it is evaluated once and in Python's order.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

from nnsight_source.syntax import at, bound_name, index_of, load, store
from nnsight_source.text import MARK

#: Passes a value through a visit: what it is named after, the value.
Pass = Callable[[str, ast.expr], ast.expr]


def assign(node: ast.Assign, passed: Pass) -> list[ast.stmt]:
    """Return what an assignment becomes."""
    if len(node.targets) == 1 and not isinstance(node.targets[0], ast.Tuple | ast.List):
        node.value = passed(bound_name(node.targets[0]), node.value)
        return [node]
    leaves = [leaf for target in node.targets for leaf in _leaves(target)]
    if all(isinstance(leaf, ast.Name) for leaf in leaves):
        return [node, *(_again(leaf.id, node, passed) for leaf in leaves if isinstance(leaf, ast.Name))]
    held = _Held(node)
    whole = held.hold(node.value) if len(node.targets) > 1 else node.value
    for target in node.targets:
        if not isinstance(target, ast.Tuple | ast.List):
            held.add([target], passed(bound_name(target), whole))
            continue
        parts: list[tuple[ast.expr, ast.expr]] = []
        held.add([_with_names(target, held, parts)], whole)
        for leaf, value in parts:
            held.add([leaf], passed(bound_name(leaf), value))
    return held.statements()


def assign_in_place(node: ast.AugAssign, passed: Pass) -> list[ast.stmt]:
    """Return what `target += value` and the like become."""
    target = node.target
    if isinstance(target, ast.Name):
        return [node, _again(target.id, node, passed)]
    held = _Held(node)
    base = held.hold(target.value)
    if isinstance(target, ast.Attribute):
        read: ast.expr = at(target, ast.Attribute(base, target.attr, ast.Load()))
        written: ast.expr = at(target, ast.Attribute(base, target.attr, ast.Store()))
    else:
        index = held.hold(index_of(target.slice))
        read = at(target, ast.Subscript(base, index, ast.Load()))
        written = at(target, ast.Subscript(base, index, ast.Store()))
    value = held.hold(read)
    assert isinstance(value, ast.Name)
    node.target = at(node, ast.Name(value.id, ast.Store()))
    held.body.append(node)
    held.add([written], passed(bound_name(target), value))
    return held.statements()


def _again(name: str, node: ast.stmt, passed: Pass) -> ast.stmt:
    """Return `name = @value(n, name)`, to stand after the statement that binds it."""
    value = passed(name, load(node, name))
    return at(node, ast.Assign(targets=[store(node, name)], value=value))


class _Held:
    """Statements in the place of one, with names for what they hold on the way."""

    def __init__(self, node: ast.stmt) -> None:
        self._node = node
        self._names: list[str] = []
        self.body: list[ast.stmt] = []

    def name(self) -> str:
        self._names.append(f"{MARK}{len(self._names)}")
        return self._names[-1]

    def hold(self, value: ast.expr) -> ast.expr:
        """Evaluate something here; return what it gave."""
        name = self.name()
        self.add([store(self._node, name)], value)
        return load(self._node, name)

    def add(self, targets: list[ast.expr], value: ast.expr) -> None:
        self.body.append(at(self._node, ast.Assign(targets=targets, value=value)))

    def statements(self) -> list[ast.stmt]:
        """Return them all; nothing is held after them."""
        names: list[ast.expr] = [at(self._node, ast.Name(name, ast.Del())) for name in self._names]
        return [*self.body, at(self._node, ast.Delete(targets=names))]


def _leaves(target: ast.expr) -> list[ast.expr]:
    """Return what a target binds, one by one."""
    if isinstance(target, ast.Tuple | ast.List):
        return [leaf for element in target.elts for leaf in _leaves(element)]
    return _leaves(target.value) if isinstance(target, ast.Starred) else [target]


def _with_names(target: ast.expr, held: _Held, parts: list[tuple[ast.expr, ast.expr]]) -> ast.expr:
    """Return a target that binds names instead; note what each of them is to be assigned to then."""
    if isinstance(target, ast.Tuple | ast.List):
        return at(target, type(target)([_with_names(part, held, parts) for part in target.elts], ast.Store()))
    if isinstance(target, ast.Starred):
        return at(target, ast.Starred(_with_names(target.value, held, parts), ast.Store()))
    name = held.name()
    parts.append((target, load(target, name)))
    return store(target, name)
