"""A function's source, rewritten so that every operation passes through a visit, and compiled with its line numbers.

`f(a, b)` becomes `@call(n, f, a, b)`, `a @ b` becomes `@call(n, @matmul, a, b)`, and the value of an assignment, of a
subscript or of a `return` becomes `@value(n, value)`. The names with an @ are further cells of the function's closure.
Names and their order are those of 0.6.2: the dotted path that is called, with a counter of its own, what is inside an
expression before the expression.
"""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import CodeType, FunctionType
from typing import Any, TypeVar

from nnsight.protocols import PerCode
from nnsight_source.spots import Rewritten, Spot
from nnsight_source.text import MARK, Function, compile_function, read

CALL, VALUE = MARK + "call", MARK + "value"

_OPERATORS: dict[type[ast.AST], tuple[str, Callable[..., Any]]] = {
    ast.Add: ("add", operator.add), ast.Sub: ("sub", operator.sub), ast.Mult: ("mul", operator.mul),
    ast.MatMult: ("matmul", operator.matmul), ast.Div: ("div", operator.truediv), ast.Mod: ("mod", operator.mod),
    ast.FloorDiv: ("floordiv", operator.floordiv), ast.Pow: ("pow", operator.pow),
    ast.LShift: ("lshift", operator.lshift), ast.RShift: ("rshift", operator.rshift),
    ast.BitAnd: ("bitand", operator.and_), ast.BitOr: ("bitor", operator.or_), ast.BitXor: ("bitxor", operator.xor),
    ast.USub: ("neg", operator.neg), ast.UAdd: ("pos", operator.pos), ast.Invert: ("invert", operator.invert),
    ast.Lt: ("lt", operator.lt), ast.LtE: ("le", operator.le), ast.Gt: ("gt", operator.gt),
    ast.GtE: ("ge", operator.ge), ast.Eq: ("eq", operator.eq), ast.NotEq: ("ne", operator.ne),
}  # fmt: skip
#: What the rewritten code finds in its closure under the names of operators.
OPERATORS = {MARK + name: function for name, function in _OPERATORS.values()}
_OWN = frozenset({CALL, VALUE, *OPERATORS})

# These look at the frame that calls them, so they are called where they stand; only their result passes through.
_OF_THE_FRAME = frozenset({
    "super", "locals", "globals", "vars", "dir", "eval", "exec", "sys._getframe", "inspect.currentframe",
    "inspect.stack", "warnings.warn",
})  # fmt: skip

Node = TypeVar("Node", bound=ast.expr | ast.stmt)
_known: PerCode[Rewritten] = PerCode()


def rewritten(function: FunctionType) -> Rewritten:
    """Return a function rewritten; once per code object.

    Raises:
        SourceError: it has no source, or another one than what is running.
    """
    known = _known.of(function.__code__)
    found = known.get(None)
    if found is None:
        found = known[None] = _rewrite(function)
    return found


def known_rewritten(code: CodeType) -> Rewritten | None:
    """Return what a function's code was rewritten to, if it was."""
    return _known.of(code).get(None)


def _rewrite(function: FunctionType) -> Rewritten:
    code = function.__code__
    text = read(function)
    rewriter = _Rewriter()
    rewriter.function(text.node)
    new = compile_function(text.node, code, _OWN)
    count = code.co_argcount + code.co_kwonlyargcount
    return Rewritten(
        new, rewriter.spots, rewriter.size, text.lines, text.node.lineno, code.co_varnames[:count]
    )  # fmt: skip


class _Rewriter(ast.NodeTransformer):
    """Rewrites the syntax tree of one function in place, and notes what it finds."""

    def __init__(self) -> None:
        self.spots: list[Spot] = []
        self.size = 0
        self._counters: dict[str, Counter[str]] = {
            "call": Counter(), "variable": Counter(), "operator": Counter(), "return": Counter(),
        }  # fmt: skip
        self._under: tuple[tuple[int, str], ...] = ()
        self._after = 0
        self._depth = 0  # of functions inside the function

    def function(self, node: Function) -> None:
        node.body = self._visit_all(node.body)

    # -- what is noted -----------------------------------------------------------------------------------------------

    def _note(
        self, kind: str, base: str, node: ast.AST, callee: str = "", has_input: bool = False, given: int = -1
    ) -> Spot:
        counters = self._counters[kind]
        count = counters[base]
        counters[base] = count + 1
        first = self.size
        self.size += 2 if has_input else 1
        name = f"returns[{count}]" if kind == "return" else f"{base}_{count}"
        span = node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]
        spot = Spot(
            kind, name, first if has_input else -1, self.size - 1, first if has_input else given, callee, span,
            self._under, self._after,
        )  # fmt: skip
        self.spots.append(spot)
        return spot

    def _value(self, kind: str, base: str, value: ast.expr, place: ast.AST) -> ast.expr:
        """Pass a value through a visit."""
        # The value of an operation is that of what was noted last: operations are noted after what is inside them.
        is_made = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == CALL
        spot = self._note(kind, base, place, given=self.spots[-1].input if is_made else -1)
        return _call(value, VALUE, spot.output, [value])

    # -- expressions -------------------------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> ast.expr:
        callee = _dotted(node.func)
        self.generic_visit(node)
        name = _name(node.func)
        if callee in _OF_THE_FRAME:
            spot = self._note("call", name, node, callee)
            return _call(node, VALUE, spot.output, [node])
        spot = self._note("call", name, node, callee, has_input=True)
        return _call(node, CALL, spot.input, [node.func, *node.args], node.keywords)

    def _operator(self, node: ast.expr, kind: ast.AST, operands: list[ast.expr]) -> ast.expr:
        known = _OPERATORS.get(type(kind))
        is_constant = all(isinstance(operand, ast.Constant) for operand in operands)
        self.generic_visit(node)
        if known is None or is_constant:
            return node
        spot = self._note("operator", known[0], node, has_input=True)
        if isinstance(node, ast.BinOp):
            operands = [node.left, node.right]
        elif isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.UnaryOp):
            operands = [node.operand]
        return _call(node, CALL, spot.input, [_at(node, ast.Name(MARK + known[0], ast.Load())), *operands])

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        return self._operator(node, node.op, [node.left, node.right])

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        return self._operator(node, node.op, [node.operand])

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        if len(node.ops) == 1:
            return self._operator(node, node.ops[0], [node.left, *node.comparators])
        node.left = self.visit(node.left)
        node.comparators[0] = self.visit(node.comparators[0])
        node.comparators[1:] = self._below(node, "expression", node.comparators[1:])
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load):
            return self._value("operator", "getitem", node, node)
        return node

    def visit_NamedExpr(self, node: ast.NamedExpr) -> ast.expr:
        node.value = self.visit(node.value)
        node.value = self._value("variable", node.target.id, node.value, node)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        node.test = self.visit(node.test)
        node.body = self._below(node, "expression", [node.body])[0]
        node.orelse = self._below(node, "expression", [node.orelse])[0]
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        node.values = [self.visit(node.values[0]), *self._below(node, "expression", node.values[1:])]
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        self._defaults(node.args)
        node.body = self._below(node, "function", [node.body])[0]
        return node

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> ast.expr:
        node.elt = self._below(node, "loop", [node.elt])[0]
        self._generators(node, node.generators)
        return node

    visit_SetComp = visit_GeneratorExp = visit_ListComp

    def visit_DictComp(self, node: ast.DictComp) -> ast.expr:
        node.key, node.value = self._below(node, "loop", [node.key, node.value])
        self._generators(node, node.generators)
        return node

    def _generators(self, node: ast.expr, generators: list[ast.comprehension]) -> None:
        for index, generator in enumerate(generators):
            if index:
                generator.iter = self._below(node, "loop", [generator.iter])[0]
            else:
                generator.iter = self.visit(generator.iter)
            generator.ifs = self._below(node, "loop", generator.ifs)

    # -- statements --------------------------------------------------------------------------------------------------

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        if len(node.targets) == 1 and not isinstance(node.targets[0], ast.Tuple | ast.List):
            node.value = self._value("variable", _name(node.targets[0]), node.value, node)
            return node
        bound = [name for target in node.targets for name in _names(target)]
        return [node, *(self._again(name, node) for name in bound)]

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        node.target = self.visit(node.target)
        if node.value is not None:
            node.value = self.visit(node.value)
            node.value = self._value("variable", _name(node.target), node.value, node)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        return [node, self._again(node.target, node)] if _dotted(node.target) else node

    def _again(self, target: ast.expr, node: ast.stmt) -> ast.stmt:
        """Return `target = @value(n, target)`, to stand after the statement that binds it."""
        read, written = _copy(target, ast.Load()), _copy(target, ast.Store())
        value = self._value("variable", _name(target), read, node)
        again: ast.stmt = _at(node, ast.Assign(targets=[written], value=value))
        return again

    def visit_Return(self, node: ast.Return) -> ast.stmt:
        value: ast.expr = _at(node, ast.Constant(value=None)) if node.value is None else self.visit(node.value)
        if self._depth:
            node.value = value
            return node
        node.value = self._value("return", "returns", value, node)
        if self._under:
            self._after = self._after or node.lineno
        return node

    def visit_If(self, node: ast.If) -> ast.stmt:
        node.test = self.visit(node.test)
        node.body = self._below(node, "if", node.body)
        node.orelse = self._below(node, "else", node.orelse)
        return node

    def visit_For(self, node: ast.For | ast.AsyncFor) -> ast.stmt:
        node.target = self.visit(node.target)
        node.iter = self.visit(node.iter)
        node.body = self._below(node, "loop", node.body)
        node.orelse = self._below(node, "loop", node.orelse)
        return node

    visit_AsyncFor = visit_For

    def visit_While(self, node: ast.While) -> ast.stmt:
        node.test = self._below(node, "loop", [node.test])[0]
        node.body = self._below(node, "loop", node.body)
        node.orelse = self._below(node, "loop", node.orelse)
        return node

    def visit_Try(self, node: Any) -> ast.stmt:
        node.body = self._below(node, "try", node.body)
        for handler in node.handlers:
            handler.body = self._below(handler, "except", handler.body)
        node.orelse = self._below(node, "try", node.orelse)
        node.finalbody = self._visit_all(node.finalbody)
        found: ast.stmt = node
        return found

    visit_TryStar = visit_Try

    def visit_Match(self, node: ast.Match) -> ast.stmt:
        node.subject = self.visit(node.subject)
        for case in node.cases:
            if case.guard is not None:
                case.guard = self._below(case.guard, "case", [case.guard])[0]
            case.body = self._below(case.pattern, "case", case.body)
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        node.test = self.visit(node.test)
        if node.msg is not None:
            node.msg = self._below(node, "expression", [node.msg])[0]
        return node

    def visit_FunctionDef(self, node: Function) -> ast.stmt:
        self._defaults(node.args)
        self._depth += 1
        node.body = self._below(node, "function", node.body)
        self._depth -= 1
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def _defaults(self, arguments: ast.arguments) -> None:
        arguments.kw_defaults = [None if value is None else self.visit(value) for value in arguments.kw_defaults]
        arguments.defaults = self._visit_all(arguments.defaults)

    # -- where things stand ------------------------------------------------------------------------------------------

    def _below(self, node: Any, what: str, parts: Sequence[Any]) -> list[Any]:
        """Rewrite what is reached, and how often, as `node` decides."""
        outer = self._under
        self._under = (*outer, (node.lineno, what))
        found = self._visit_all(parts)
        self._under = outer
        return found

    def _visit_all(self, parts: Iterable[Any]) -> list[Any]:
        found: list[Any] = []
        for part in parts:
            new = self.visit(part)
            if isinstance(new, list):
                found += new
            else:
                found.append(new)
        return found


def _dotted(node: ast.expr) -> str:
    """Return the dotted path that an expression is, "" when it is none."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else ""


def _name(node: ast.expr) -> str:
    """Return the base of the name of what is called or bound: the attributes after the last thing that has no name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        names.append(node.id)
    elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        names += ["item", _name(node.value)]
    return "_".join(reversed(names)) or "unknown"


def _names(target: ast.expr) -> list[ast.Name]:
    """Return the plain names that a target binds."""
    if isinstance(target, ast.Tuple | ast.List):
        return [name for element in target.elts for name in _names(element)]
    if isinstance(target, ast.Starred):
        return _names(target.value)
    return [target] if isinstance(target, ast.Name) else []


def _copy(target: ast.expr, context: ast.expr_context) -> ast.expr:
    if isinstance(target, ast.Attribute):
        new: ast.expr = ast.Attribute(_copy(target.value, ast.Load()), target.attr, context)
    else:
        assert isinstance(target, ast.Name)
        new = ast.Name(target.id, context)
    return _at(target, new)


def _call(
    place: ast.expr, name: str, number: int, args: list[ast.expr], keywords: Sequence[ast.keyword] = ()
) -> ast.expr:
    function = _at(place, ast.Name(name, ast.Load()))
    index = _at(place, ast.Constant(value=number))
    return _at(place, ast.Call(func=function, args=[index, *args], keywords=list(keywords)))


def _at(place: ast.expr | ast.stmt, node: Node) -> Node:
    node.lineno, node.col_offset = place.lineno, place.col_offset
    node.end_lineno, node.end_col_offset = place.end_lineno, place.end_col_offset
    return node
