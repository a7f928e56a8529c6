"""Which names a block binds and reads, and what in it cannot be taken out of its frame."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class Names(ast.NodeVisitor):
    """The names of one scope, those of the scopes in it included where they mean this one's.

    Attributes:
        bound: names that the scope binds itself.
        rebound: names that functions inside bind for it, or for a scope around it, by `nonlocal`.
        loaded: names that it or a scope inside reads from it, or from outside.
        deleted: names that it deletes.
        globals: names declared global; `nonlocals`: names declared nonlocal.
        inner_globals: names that functions and classes inside declare global.
        unmovable: statements that only work in the frame they were written in.
        uses_super: whether `super()` is called in the scope itself.
        has_annotations: whether a name of it is annotated.
    """

    def __init__(self) -> None:
        self.bound: set[str] = set()
        self.rebound: set[str] = set()
        self.loaded: set[str] = set()
        self.deleted: set[str] = set()
        self.globals: set[str] = set()
        self.inner_globals: set[str] = set()
        self.nonlocals: set[str] = set()
        self.unmovable: list[ast.AST] = []
        self.uses_super = self.has_annotations = False
        self._loops = 0

    def scan(self, nodes: Iterable[ast.AST | None]) -> Names:
        for node in nodes:
            if node is not None:
                self.visit(node)
        return self

    def generic_visit(self, node: ast.AST) -> None:
        # As the base class does it, without generators, and without a call for each `ctx` and operator.
        for field in node._fields:
            value = getattr(node, field, None)
            if isinstance(value, list):
                for item in value:
                    if isinstance(item, ast.AST):
                        self.visit(item)
            elif isinstance(value, ast.AST) and value._fields:
                self.visit(value)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.loaded.add(node.id)
        else:
            self.bound.add(node.id)
            if isinstance(node.ctx, ast.Del):
                self.deleted.add(node.id)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.loaded.add(node.target.id)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
            self.loaded.add("__class__")
            self.uses_super = not node.keywords
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.has_annotations = True
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.bound.add(node.name)
        arguments = node.args
        annotations = [a.annotation for a in _arguments(arguments)] + [node.returns]
        self.scan([*node.decorator_list, *arguments.defaults, *arguments.kw_defaults, *annotations])
        self._merge(inner_names(node))

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.scan([*node.args.defaults, *node.args.kw_defaults])
        self._merge(inner_names(node))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.bound.add(node.name)
        self.scan([*node.decorator_list, *node.bases, *node.keywords])
        inner = Names().scan(node.body)
        self.loaded |= inner.loaded - inner.globals - {"__class__"}  # its methods mean the class itself
        self._take_in(inner)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        self.visit(node.generators[0].iter)  # computed outside
        inner = Names()
        targets: set[str] = set()
        for generator in node.generators:
            targets |= Names().scan([generator.target]).bound
            inner.scan([*([] if generator is node.generators[0] else [generator.iter]), *generator.ifs])
            if generator.is_async and not isinstance(node, ast.GeneratorExp):
                self.unmovable.append(node)
        results = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        inner.scan(results)
        self.loaded |= inner.loaded - targets
        self.bound |= inner.bound  # a walrus binds outside
        self._take_in(inner)
        self.unmovable += inner.unmovable
        self.uses_super |= inner.uses_super

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def _merge(self, inner: Names) -> None:
        own = inner.bound - inner.nonlocals - inner.globals
        self.loaded |= inner.loaded - own - inner.globals
        self.deleted |= inner.deleted - own - inner.globals
        self._take_in(inner, own)

    def _take_in(self, inner: Names, own: Collection[str] = ()) -> None:
        """Note what a scope inside declares for scopes around it, but for names that are its own."""
        self.rebound |= inner.nonlocals | inner.rebound.difference(own)
        self.inner_globals |= inner.globals | inner.inner_globals

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name == "*":
                self.unmovable.append(node)
            else:
                self.bound.add(alias.asname or alias.name.partition(".")[0])

    visit_ImportFrom = visit_Import

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self.bound.add(node.name)
        self.generic_visit(node)

    def visit_MatchAs(self, node: ast.MatchAs | ast.MatchStar) -> None:
        if node.name:
            self.bound.add(node.name)
        self.generic_visit(node)

    visit_MatchStar = visit_MatchAs

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        if node.rest:
            self.bound.add(node.rest)
        self.generic_visit(node)

    def visit_Global(self, node: ast.Global) -> None:
        self.globals |= set(node.names)

    def visit_Nonlocal(self, node: ast.Nonlocal) -> None:
        self.nonlocals |= set(node.names)
        self.bound |= set(node.names)

    def visit_For(self, node: ast.For | ast.While) -> None:
        if isinstance(node, ast.For):
            self.scan([node.target, node.iter])
        else:
            self.scan([node.test])
        self._loops += 1
        self.scan(node.body)
        self._loops -= 1
        self.scan(node.orelse)

    visit_While = visit_For

    def visit_Break(self, node: ast.Break | ast.Continue) -> None:
        if not self._loops:
            self.unmovable.append(node)

    visit_Continue = visit_Break

    def _unmovable(self, node: ast.AST) -> None:
        self.unmovable.append(node)
        self.generic_visit(node)

    visit_Return = visit_Yield = visit_YieldFrom = visit_Await = visit_AsyncFor = visit_AsyncWith = _unmovable


def inner_names(node: Function) -> Names:
    """Return the names of a function's own scope."""
    names = Names()
    names.bound |= {argument.arg for argument in _arguments(node.args)}
    names.scan(node.body if isinstance(node.body, list) else [node.body])
    return names


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    extra = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *extra]


def mangle(name: str, owner: str) -> str:
    """Return a name as Python stores it inside class `owner` ('' for outside of classes)."""
    if not owner or not name.startswith("__") or name.endswith("__"):
        return name
    return f"_{owner.lstrip('_')}{name}"
