"""Compiling the body of a block as a closure, with a cell for every name that is not global."""

from __future__ import annotations
import __future__ as future

import ast
import copy
import functools
import operator
import sys
import weakref
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from nnsight.capture.locate import CHANGED, find_around, find_in, find_with
from nnsight.capture.names import Names, mangle
from nnsight.capture.percode import PerCode
from nnsight.capture.rewrite import LOAD, Prepare, exposed
from nnsight.capture.sharing import shared_names
from nnsight.capture.verify import differs, variables
from nnsight.errors import CaptureError

if TYPE_CHECKING:
    from nnsight.capture.plan import Plan

#: What was entered; no program can use its name.
ENTERED = "@entered"

_OPTIMIZED, _NEW_LOCALS = 0x1, 0x2  # code flags: both for functions, neither for modules and class bodies
_FUTURE = functools.reduce(operator.or_, (getattr(future, name).compiler_flag for name in future.all_feature_names))
_ASYNC = "a plain `with model.trace(input):`, where it works"
_UNMOVABLE: dict[type[ast.AST], tuple[str, str]] = {
    ast.Return: ("return", "bind the value to a name and return it after the block"),
    ast.Yield: ("yield", "collect the values in a list and yield them after the block"),
    ast.YieldFrom: ("yield from", "collect the values in a list and yield them after the block"),
    ast.Await: ("await", f"await before the block, or use {_ASYNC}"),
    ast.AsyncFor: ("async for", f"loop before the block, or use {_ASYNC}"),
    ast.AsyncWith: ("async with", f"put the block inside of it, or use {_ASYNC}"),
    ast.Break: ("break", "set a flag in the block and break after it"),
    ast.Continue: ("continue", "use `if` inside the block"),
    ast.ImportFrom: ("import *", "import the names one by one"),
}
_ASYNC_COMPREHENSION = ("async for", f"collect the values before the block, or use {_ASYNC}")

_known: PerCode[Block] = PerCode()
_compiled: PerCode[weakref.ref[Block]] = PerCode()


class Block:
    """What is known of one `with` item, from its source: the body it stands for, and that body's names.

    Names are given as Python stores them (mangled inside classes).

    Attributes:
        bound: names that the body binds; `loaded` those it reads; `deleted` those it deletes.
        exposed: names that it may read before it has bound them.
        names: all names but those declared global.
        live: names that functions outside the block share with it, so that their one cell is used.
        local: names that are variables of the function around the block.
        is_function: whether a function is around it, not a module or a class body.
        variables: the names that are cells of the compiled body where it is.
        plans: how its variables start, by what that depends on.
        first: the first argument of that function, for `super()`.
        is_nested: whether the block stands in another one, which was compiled here.
    """

    def __init__(
        self,
        node: ast.With,
        item: int,
        code: CodeType,
        first: str,
        is_nested: bool,
        shared: frozenset[str] | None = None,
        around: Callable[[], ast.AST | None] = lambda: None,
    ) -> None:
        """Look into a block.

        Args:
            node: the `with`.
            item: which of its items is ours.
            code: the code that it stands in.
            first: the first argument of the function it was written in.
            is_nested: whether that code was compiled here.
            shared: where all variables of that code are cells because it was compiled here: those that it shares.
            around: returns the source of that code, if it can be found.
        """
        self.is_nested = is_nested
        self.node, self.item, self.first = node, item, first
        self.filename, self.name, self.qualname = code.co_filename, code.co_name, code.co_qualname
        self.flags = code.co_flags & _FUTURE
        self.is_function = bool(code.co_flags & _OPTIMIZED)
        self.is_class = not code.co_flags & (_OPTIMIZED | _NEW_LOCALS) and code.co_name != "<module>"
        self.owner = code.co_name if self.is_class else owner_class(code)
        names = Names().scan(self.parts)
        if names.uses_super and first:
            names.loaded.add(first)
        self.unmovable = names.unmovable
        self.local = frozenset(variables(code))
        bound = self._mangled(names.bound | names.rebound)
        self.declared_global = frozenset(names.globals)
        if self.is_function:
            self.declared_global |= bound - self.local
        elif not self.is_class:  # the variables of a module are what functions in the block declare global
            self.declared_global |= names.inner_globals
        self.bound = bound - self.declared_global
        self.loaded = self._mangled(names.loaded)
        self.deleted = self._mangled(names.deleted)
        self.names = (self.bound | self.loaded) - self.declared_global
        self.variables = self.names & self.local
        self.live = shared_names(code, self, around, shared)
        self._plain = {mangle(name, self.owner): name for name in names.bound | names.rebound | names.loaded}
        #: Whether the body cannot be compiled just as it is written.
        self._is_rewritten = names.uses_super or names.has_annotations or item < len(node.items) - 1
        self.plans: dict[Any, Plan] = {}
        self._variants: dict[tuple[frozenset[str], frozenset[str]], CodeType] = {}

    @functools.cached_property
    def exposed(self) -> frozenset[str]:
        return self._mangled(exposed(self.parts))

    @property
    def where(self) -> str:
        return f"{self.filename}:{self.node.lineno}"

    @functools.cached_property
    def target(self) -> Any:
        """What `as` binds: a name, a list of targets where it unpacks, None for anything else."""
        return _target(self.node.items[self.item].optional_vars, self.owner)

    @property
    def parts(self) -> list[ast.AST]:
        """The target, the later items of the header and the statements of the body."""
        item, later = self.node.items[self.item], self.node.items[self.item + 1 :]
        target = [] if item.optional_vars is None else [item.optional_vars]
        return [*target, *later, *self.node.body]

    def compile(self, cells: frozenset[str], marked: frozenset[str]) -> CodeType:
        """Return the body as the code of a closure.

        Args:
            cells: the names that are cells of the closure; all others are global.
            marked: the names whose loads go through the `@load` function, because another block may bind them.
        """
        key = (cells, marked)
        found = self._variants.get(key)
        if found is None:
            body = list(self.node.body)
            if self._is_rewritten or marked:
                prepare = Prepare({self._plain.get(name, name) for name in marked}, self.first)
                body = prepare.block(self._written_body())
            found = self._variants[key] = self._closure(body, cells)
            _remember(found, weakref.ref(self))
        return found

    def check(self, code: CodeType) -> None:
        """Compare the source with the code that is running.

        Raises:
            CaptureError: they differ.
        """
        # What will run is compared, so that most blocks are compiled once. Where that cannot be compared, or what is
        # done with a name depends on how it is stored, the body is compiled once more, as it stands.
        is_comparable = self.is_function and not self._is_rewritten
        if is_comparable and not differs(code, self.compile(self.variables, frozenset()), self.parts):
            return
        if differs(code, self._as_it_stands(code), self.parts):
            raise CaptureError(CHANGED.format(where=self.where))

    def _mangled(self, names: set[str]) -> frozenset[str]:
        return frozenset(mangle(name, self.owner) for name in names) if self.owner else frozenset(names)

    def _written_body(self) -> list[ast.stmt]:
        """Return the statements of the body inside the later items, each a `with` that stands where the item does."""
        body: list[ast.stmt] = copy.deepcopy(self.node.body)
        for item in reversed(self.node.items[self.item + 1 :]):
            item = copy.deepcopy(item)
            body = [ast.copy_location(ast.With(items=[item], body=body), item.context_expr)]
        return body

    @property
    def _place(self) -> dict[str, Any]:
        """Where statements stand that are added: at the `with`, which is no part of its body."""
        names = ("lineno", "col_offset", "end_lineno", "end_col_offset")
        return {name: getattr(self.node, name) for name in names}

    def _closure(self, body: list[ast.stmt], cells: frozenset[str]) -> CodeType:
        """Compile statements as a function without arguments, whose free variables are `cells`."""
        place = self._place
        first: list[ast.stmt] = []
        if self.declared_global:
            first.append(ast.Global(names=sorted(self.declared_global), **place))
        if shared := sorted(self._plain.get(name, name) for name in self.bound & cells):
            first.append(ast.Nonlocal(names=shared, **place))
        first += self._bind_target()
        # With an end of its own: one that Python adds would be taken for a part of the last statement.
        body = [*first, *body, ast.Return(value=None, **place)]
        names = sorted(self._plain.get(name, name) for name in cells)
        inner = function_node(self.name if self.name.isidentifier() else "block", [], body, place)
        statements: list[ast.stmt] = [function_node("factory", [*names, ENTERED, LOAD], [inner], place)]
        if self.owner:
            statements = [class_node(self.owner, statements, place)]
        code = self._compile(statements, 3 if self.owner else 2)
        return code.replace(co_name=self.name, co_qualname=self.qualname)

    def _bind_target(self) -> list[ast.stmt]:
        """Return the statement that does what `as` does."""
        target, place = self.node.items[self.item].optional_vars, self._place
        if target is None:
            return []
        return [ast.Assign(targets=[target], value=ast.Name(ENTERED, ast.Load(), **place), **place)]

    def _as_it_stands(self, code: CodeType) -> CodeType:
        """Compile the body as it is written, in a function, class or module such as the one around it."""
        place = self._place
        later = self.node.items[self.item + 1 :]
        body: list[ast.stmt] = list(self.node.body)
        if later:
            body = [ast.With(items=later, body=body, **place)]
        # In a `with`, as it is: what follows a statement has a part in how Python lays out its instructions.
        around = ast.withitem(context_expr=ast.Name(ENTERED, ast.Load(), **place), optional_vars=None)
        body = [ast.With(items=[around], body=[*self._bind_target(), *body], **place)]
        depth = 0
        if self.is_function:
            own = [name for name in (*code.co_varnames, *code.co_cellvars) if name.isidentifier()]
            inner = [function_node("uses", [], [_read_all(code.co_cellvars, place)], place)]
            body = [
                function_node("f", list(dict.fromkeys(own)), [*inner, *body, ast.Return(value=None, **place)], place)
            ]
            depth = 1
        else:
            body.append(_read_all((ENTERED,), place))  # an end of its own, as below
            if self.is_class:
                body = [class_node(self.name, body, place)]
                depth = 1
        if depth:
            body = [function_node("outer", [name for name in code.co_freevars if name != "__class__"], body, place)]
            depth += 1
        if self.owner and not self.is_class:
            body = [class_node(self.owner, body, place)]
            depth += 1
        return self._compile(body, depth)

    def _compile(self, statements: list[ast.stmt], depth: int) -> CodeType:
        tree = ast.Module(body=statements, type_ignores=[])
        code: CodeType = compile(tree, self.filename, "exec", flags=self.flags, dont_inherit=True)
        for _ in range(depth):
            code = next(constant for constant in code.co_consts if isinstance(constant, CodeType))
        return code


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
    around = _compiled.of(code).get(None)
    outer = around() if around is not None else None
    if outer is not None:  # code compiled here: its source is at hand, whatever has become of the file
        node, item = find_in(outer.node, frame)
    else:
        node, item = find_with(frame)
    # A compiled body takes no arguments: what `super()` in it means is the first one of the function it was written in.
    first = outer.first if outer is not None and not code.co_argcount else _first_argument(code)
    is_body = outer is not None and any(found is code for found in outer._variants.values())
    shared = outer.live if outer is not None and is_body else None
    source = (lambda: find_around(frame)) if outer is None else lambda: outer.node
    block = Block(node, item, code, first, outer is not None, shared, source)
    if block.unmovable:
        statement = block.unmovable[0]
        word, way_out = _UNMOVABLE.get(type(statement), _ASYNC_COMPREHENSION)
        line = getattr(statement, "lineno", node.lineno)
        raise CaptureError(
            f"`{word}` at {code.co_filename}:{line} cannot be used here: this block waits for its turn, so its body "
            f"runs outside of the function it is written in. Instead {way_out}."
        )
    if outer is None:
        block.check(code)
    return block


def _first_argument(code: CodeType) -> str:
    return code.co_varnames[0] if code.co_argcount or code.co_flags & 0x4 else ""  # CO_VARARGS


def _remember(code: CodeType, block: weakref.ref[Block]) -> None:
    """Note that code, and the code of functions in it, was compiled from a block's source."""
    _compiled.of(code)[None] = block
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _remember(constant, block)


def owner_class(code: CodeType) -> str:
    """Return the name of the innermost class around a function, for name mangling; '' when there is none."""
    parts = code.co_qualname.split(".")
    for inner, outer in zip(parts[::-1], parts[-2::-1], strict=False):
        if outer != "<locals>" and inner != "<locals>":
            return outer
    return ""


def _target(node: ast.expr | None, owner: str) -> Any:
    if isinstance(node, ast.Name):
        return mangle(node.id, owner)
    if isinstance(node, ast.Tuple | ast.List):
        return [_target(item, owner) for item in node.elts]
    return None


def _read_all(names: Iterable[str], place: dict[str, Any]) -> ast.stmt:
    """Return a statement that reads some names."""
    usable = (name for name in names if name.isidentifier() or name == ENTERED)
    read: list[ast.expr] = [ast.Name(name, ast.Load(), **place) for name in usable]
    return ast.Expr(ast.Tuple(read, ast.Load(), **place), **place)


def function_node(name: str, arguments: list[str], body: list[ast.stmt], place: dict[str, Any]) -> ast.FunctionDef:
    """Return the definition of a function with positional arguments."""
    taken = [ast.arg(arg=argument, **place) for argument in arguments]
    signature = ast.arguments(posonlyargs=[], args=taken, kwonlyargs=[], kw_defaults=[], defaults=[])
    node = ast.FunctionDef(name=name, args=signature, body=body, decorator_list=[], returns=None, **place)
    if sys.version_info >= (3, 12):
        node.type_params = []
    return node


def class_node(name: str, body: list[ast.stmt], place: dict[str, Any]) -> ast.ClassDef:
    """Return the definition of a class; names in it are mangled with its name."""
    node = ast.ClassDef(name=name, bases=[], keywords=[], body=body, decorator_list=[], **place)
    if sys.version_info >= (3, 12):
        node.type_params = []
    return node
