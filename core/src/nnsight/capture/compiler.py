"""Compiling the body of a block as a closure, with a cell for every name that is not global."""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from nnsight.capture.locate import CHANGED, find_with
from nnsight.capture.names import Names, inner_names, mangle
from nnsight.capture.percode import PerCode
from nnsight.capture.verify import class_node, differs, function_node, future_flags, owner_class, trust
from nnsight.errors import CaptureError

#: Names that no program can use: what was entered, and the function that reads a name another block may bind.
ENTERED, LOAD = "@entered", "@load"

_UNMOVABLE = {
    ast.Return: ("return", "bind the value to a name and return it after the block"),
    ast.Yield: ("yield", "collect the values in a list and yield them after the block"),
    ast.YieldFrom: ("yield from", "collect the values in a list and yield them after the block"),
    ast.Await: ("await", "await before the block, or use a plain `with model.trace(input):`, where it works"),
    ast.Break: ("break", "set a flag in the block and break after it"),
    ast.Continue: ("continue", "use `if` inside the block"),
    ast.ImportFrom: ("import *", "import the names one by one"),
}
_known: PerCode[Block] = PerCode()


@dataclass
class Block:
    """What is known of one `with` item, from its source: the body it stands for, and that body's names.

    Names are given as Python stores them (mangled inside classes).
    """

    node: ast.With
    item: int
    code: CodeType
    owner: str
    bound: frozenset[str]
    loaded: frozenset[str]
    deleted: frozenset[str]
    declared_global: frozenset[str]
    _variants: dict[tuple[frozenset[str], frozenset[str]], CodeType] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.code.co_filename}:{self.node.lineno}"

    @property
    def target(self) -> Any:
        """What `as` binds: a name, a list of targets where it unpacks, None for anything else."""
        return _target(self.node.items[self.item].optional_vars, self.owner)

    def compile(self, cells: frozenset[str], marked: frozenset[str]) -> CodeType:
        """Return the body as the code of a closure.

        Args:
            cells: the names that are cells of the closure; all others are global.
            marked: the names whose loads go through the `@load` function, because another block may bind them.
        """
        key = (cells, marked)
        found = self._variants.get(key)
        if found is None:
            found = self._variants[key] = self._compile(cells, marked)
        return found

    def _compile(self, cells: frozenset[str], marked: frozenset[str]) -> CodeType:
        plain = {mangle(name, self.owner): name for name in self._written()}
        node = self.node
        later = node.items[self.item + 1 :]
        body = [ast.With(items=later, body=node.body)] if later else list(node.body)
        body = _Prepare({plain.get(name, name) for name in marked}, self.code).block(body)
        target = node.items[self.item].optional_vars
        if target is not None:
            body.insert(0, ast.Assign(targets=[target], value=ast.Name(ENTERED, ast.Load())))
        shared = sorted(plain.get(name, name) for name in self.bound & cells)
        if shared:
            body.insert(0, ast.Nonlocal(names=shared))
        if self.declared_global:
            body.insert(0, ast.Global(names=sorted(self.declared_global)))
        name = self.code.co_name if self.code.co_name.isidentifier() else "block"
        inner = function_node(name, [], body)
        outer = function_node("factory", [*sorted(plain.get(name, name) for name in cells), ENTERED, LOAD], [inner])
        statements: list[ast.stmt] = [outer]
        if self.owner:
            statements = [class_node(self.owner, statements)]
        tree = ast.Module(body=statements, type_ignores=[])
        for created in (inner, outer, *body[:3], *statements):
            if not hasattr(created, "lineno"):
                ast.copy_location(created, node)
        ast.fix_missing_locations(tree)
        flags = self.code.co_flags & future_flags()
        code = compile(tree, self.code.co_filename, "exec", flags=flags, dont_inherit=True)
        for _ in range(3 if self.owner else 2):
            code = next(constant for constant in code.co_consts if isinstance(constant, CodeType))
        code = code.replace(co_name=self.code.co_name, co_qualname=self.code.co_qualname)
        trust(code)
        return code

    def _written(self) -> set[str]:
        names = Names().scan(_parts(self.node, self.item))
        return names.bound | names.loaded


def read_block(frame: FrameType) -> Block:
    """Return the block that `frame` is entering now.

    Raises:
        CaptureError: its source is not to be had, or a statement in it only works in its own frame.
    """
    code = frame.f_code
    blocks = _known.of(code)
    block = blocks.get(frame.f_lasti)
    if block is None:
        block = blocks[frame.f_lasti] = _read(frame)
    return block


def _read(frame: FrameType) -> Block:
    code = frame.f_code
    node, item = find_with(frame)
    names = Names().scan(_parts(node, item))
    for statement in names.unmovable:
        word, way_out = next((v for kind, v in _UNMOVABLE.items() if isinstance(statement, kind)), ("async", "move it"))
        line = getattr(statement, "lineno", node.lineno)
        raise CaptureError(
            f"`{word}` at {code.co_filename}:{line} cannot be used here: this block waits for its turn, so its body "
            f"runs outside of the function it is written in. Instead {way_out}."
        )
    if differs(code, node, code.co_filename):
        raise CaptureError(CHANGED.format(where=f"{code.co_filename}:{frame.f_lineno}"))
    owner = owner_class(code)
    is_function = bool(code.co_flags & 0x2)  # CO_NEWLOCALS: neither a module nor a class body
    local = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    bound = frozenset(mangle(name, owner) for name in names.bound)
    declared = names.globals | ({name for name in bound if name not in local} if is_function else set())
    return Block(
        node, item, code, owner, bound - frozenset(declared),
        frozenset(mangle(name, owner) for name in names.loaded),
        frozenset(mangle(name, owner) for name in names.deleted), frozenset(declared),
    )  # fmt: skip


def _target(node: ast.expr | None, owner: str) -> Any:
    if isinstance(node, ast.Name):
        return mangle(node.id, owner)
    if isinstance(node, ast.Tuple | ast.List):
        return [_target(item, owner) for item in node.elts]
    return None


def _parts(node: ast.With, item: int) -> list[ast.AST | None]:
    return [node.items[item].optional_vars, *node.items[item + 1 :], *node.body]


class _Prepare(ast.NodeTransformer):
    """Copies a body, marking loads of names that another block may bind, and keeping `super()` what it was."""

    def __init__(self, marked: set[str], code: CodeType) -> None:
        self._marked = marked
        self._code = code

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """Return the statements prepared. Once one has certainly bound a name, later loads need no mark."""
        prepared: list[ast.stmt] = []
        for statement in statements:
            found = self.visit(_copy(statement))
            prepared += found if isinstance(found, list) else [found]
            if isinstance(statement, ast.Assign | ast.AnnAssign | ast.Import | ast.FunctionDef | ast.ClassDef):
                self._marked = self._marked - Names().scan([statement]).bound
        return prepared

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self._marked:
            return _at(node, _load(node.id))
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AugAssign | list[ast.stmt]:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name) and node.target.id in self._marked:
            first = ast.Assign(targets=[ast.Name(node.target.id, ast.Store())], value=_load(node.target.id))
            return [_at(node, first), node]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        if node.value is None:
            return _at(node, ast.Pass())
        return _at(node, ast.Assign(targets=[node.target], value=node.value))

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args and not node.keywords:
            if self._code.co_varnames:
                node.args = [ast.Name("__class__", ast.Load()), ast.Name(self._code.co_varnames[0], ast.Load())]
                ast.fix_missing_locations(node)
        return node

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> ast.AST:
        inner = inner_names(node)
        return self._within(node, inner.bound - inner.nonlocals | inner.globals)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._within(node, Names().scan(node.body).bound)

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> ast.AST:
        return self._within(node, Names().scan([generator.target for generator in node.generators]).bound)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def _within(self, node: ast.AST, own: set[str]) -> ast.AST:
        outer, self._marked = self._marked, self._marked - own
        self.generic_visit(node)
        self._marked = outer
        return node


def _copy(node: ast.stmt) -> ast.stmt:
    return copy.deepcopy(node)


def _load(name: str) -> ast.expr:
    return ast.Call(func=ast.Name(LOAD, ast.Load()), args=[ast.Constant(name)], keywords=[])


def _at(place: ast.AST, node: ast.AST) -> ast.AST:
    return ast.fix_missing_locations(ast.copy_location(node, place))
