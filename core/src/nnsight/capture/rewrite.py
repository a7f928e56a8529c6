"""Rewriting a body for its life outside of its frame: names that another block may bind, and `super()`."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable
from typing import Any

from nnsight.capture.names import Names, inner_names

#: The function that reads a name another block may bind; no program can use its name.
LOAD = "@load"

#: What binds its targets when it has run, and where those are.
_BINDING = {
    ast.Assign: "targets", ast.AnnAssign: "target", ast.AugAssign: "target", ast.withitem: "optional_vars",
}  # fmt: skip


def exposed(parts: Iterable[ast.AST | None], certain: frozenset[str] = frozenset()) -> set[str]:
    """Return the names that statements may read before they have bound them.

    Args:
        parts: statements in their order; expressions are taken for targets.
        certain: the names bound before.
    """
    found: set[str] = set()
    for part in parts:
        if part is None:
            continue
        names = Names()
        inner: list[Iterable[ast.AST | None]] = []
        if isinstance(part, ast.For):
            names.scan([part.iter])
            inner = [[part.target, *part.body], part.orelse]
        elif isinstance(part, ast.While | ast.If):
            names.scan([part.test])
            inner = [part.body, part.orelse]
        elif isinstance(part, ast.With):
            inner = [[*part.items, *part.body]]
        elif isinstance(part, ast.Try):
            inner = [[*part.body, *part.orelse], *([handler] for handler in part.handlers), part.finalbody]
        else:
            names.scan([part])
        for branch in inner:
            found |= exposed(branch, certain)
        own = {part.name} if isinstance(part, ast.FunctionDef) and not part.decorator_list else set()
        found |= (names.loaded | names.deleted) - certain - own
        certain = certain | _surely_bound(part) - names.deleted
    return found


def _surely_bound(part: ast.AST) -> set[str]:
    """Return the names that a statement, or a target, has bound when it has run; a `:=` in it may not have."""
    if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {part.name}
    if isinstance(part, ast.AnnAssign) and part.value is None:
        return set()
    targets = getattr(part, _BINDING.get(type(part), ""), part if isinstance(part, ast.expr) else None)
    if isinstance(part, ast.Import | ast.ImportFrom):
        targets = part
    return Names().scan(targets if isinstance(targets, list) else [targets]).bound


class Prepare(ast.NodeTransformer):
    """Marks loads of names that another block may bind, and keeps `super()` what it was. Works in place."""

    def __init__(self, marked: set[str], first: str) -> None:
        self._marked = marked
        self._around = marked  # those of the function around, where the scope is a class
        self._first = first
        self._is_inside = False

    def block(self, statements: list[Any]) -> list[Any]:
        """Return the statements prepared."""
        prepared: list[Any] = []
        for statement in statements:
            found = self.visit(statement)
            prepared += found if isinstance(found, list) else [found]
        return prepared

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self._marked:
            marked: ast.expr = _at(node, _load(node.id))
            return marked
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AugAssign | list[ast.stmt]:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name) and node.target.id in self._marked:
            first = ast.Assign(targets=[ast.Name(node.target.id, ast.Store())], value=_load(node.target.id))
            return [_at(node, first), node]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name) or self._is_inside:
            return node
        plain: ast.stmt = _at(node, ast.Assign(targets=[node.target], value=node.value) if node.value else ast.Pass())
        return plain

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        is_super = isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args and not node.keywords
        if is_super and self._first and not self._is_inside:
            node.args = [ast.Name("__class__", ast.Load()), ast.Name(self._first, ast.Load())]
            _at(node, node)
        return node

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> ast.AST:
        inner = inner_names(node)
        marked = self._around - (inner.bound - inner.nonlocals | inner.globals)
        return self._within(node, ("body",), marked, marked)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        inner = Names().scan(node.body)
        # The functions in a class do not see its names: what they read is around it.
        return self._within(
            node, ("body",), self._marked - (inner.bound - inner.nonlocals | inner.globals), self._around
        )

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> ast.AST:
        first = node.generators[0]
        first.iter = self.visit(first.iter)  # computed outside
        marked = self._around - Names().scan([generator.target for generator in node.generators]).bound
        iterated, first.iter = first.iter, ast.Constant(None)
        self._within(node, node._fields, marked, marked, self._is_inside)
        first.iter = iterated
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def _within(
        self, node: ast.AST, fields: Collection[str], marked: set[str], around: set[str], is_inside: bool = True
    ) -> ast.AST:
        """Visit a node, those of its fields that are a scope of their own with other marks."""
        for field, value in ast.iter_fields(node):
            outer = self._marked, self._around, self._is_inside
            if field in fields:
                self._marked, self._around, self._is_inside = marked, around, is_inside
            if isinstance(value, list):
                value[:] = self.block(value)
            elif isinstance(value, ast.AST):
                setattr(node, field, self.visit(value))
            self._marked, self._around, self._is_inside = outer
        return node


def _load(name: str) -> ast.expr:
    return ast.Call(func=ast.Name(LOAD, ast.Load()), args=[ast.Constant(name)], keywords=[])


def _at(place: ast.AST, node: Any) -> Any:
    """Give a node, and what is in it, the place of another one where it has none."""
    if not hasattr(node, "lineno"):
        ast.copy_location(node, place)
    return ast.fix_missing_locations(node)
