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
from typing import Any

from nnsight.protocols import PerCode
from nnsight_source.assign import assign, assign_in_place
from nnsight_source.spots import Rewritten, Spot
from nnsight_source.syntax import CALL, GETITEM, SLICE, VALUE, at, bound_name, call, called_name, dotted, index_of, load
from nnsight_source.text import MARK, Function, compile_function, read

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


def _own(names: Any) -> Any:
    """Return what `locals()` and the like give without the names that rewriting has added."""
    if isinstance(names, dict):
        return {name: value for name, value in names.items() if not str(name).startswith(MARK)}
    return [name for name in names if not str(name).startswith(MARK)] if isinstance(names, list) else names


#: What the rewritten code finds in its closure, besides what its operations pass through.
OPERATORS: dict[str, Callable[..., Any]] = {
    **{MARK + name: function for name, function in _OPERATORS.values()},
    GETITEM: operator.getitem, SLICE: slice, MARK + "own": _own,
}  # fmt: skip
_OWN = frozenset({CALL, VALUE, *OPERATORS})

# These look at the frame that calls them, so they are called where they stand; only their result passes through.
_OF_THE_FRAME = frozenset({
    "super", "locals", "globals", "vars", "dir", "eval", "exec", "sys._getframe", "inspect.currentframe",
    "inspect.stack", "warnings.warn",
})  # fmt: skip
_NAMES_OF_THE_FRAME = frozenset({"locals", "vars", "dir"})

_LEAVES = frozenset({
    ast.Name, ast.Constant, *ast.expr_context.__subclasses__(), *ast.operator.__subclasses__(),
    *ast.unaryop.__subclasses__(), *ast.cmpop.__subclasses__(), *ast.boolop.__subclasses__(),
})  # fmt: skip

_known: PerCode[Rewritten] = PerCode()
_visitors: dict[type[ast.AST], Callable[[_Rewriter, Any], Any]] = {}


def rewritten(function: FunctionType) -> Rewritten:
    """Return a function rewritten; once per code object.

    Raises:
        SourceError: it has no source, or another one than what is running.
    """
    known = _known.of(function.__code__)
    found = known.get(None)
    if found is None:
        found = known.setdefault(None, _rewrite(function))  # of two threads that look first, one is right for both
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

    def visit(self, node: ast.AST) -> Any:
        """Rewrite a node, as the base class does in twice the time: half of all are names, constants and the like."""
        kind = type(node)
        if kind in _LEAVES:
            return node
        visitor = _visitors.get(kind)
        if visitor is None:
            visitor = _visitors[kind] = getattr(_Rewriter, f"visit_{kind.__name__}", _Rewriter.generic_visit)
        return visitor(self, node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name in node._fields:
            part = getattr(node, name, None)
            if isinstance(part, list):
                if part:
                    part[:] = self._visit_all(part)
            elif isinstance(part, ast.AST) and type(part) not in _LEAVES:
                setattr(node, name, self.visit(part))
        return node

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
        return call(value, VALUE, spot.output, [value])

    # -- expressions -------------------------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> ast.expr:
        callee = dotted(node.func)
        self.generic_visit(node)
        name = called_name(node.func)
        if callee in _OF_THE_FRAME:
            spot = self._note("call", name, node, callee)
            found: ast.expr = node
            if callee in _NAMES_OF_THE_FRAME and not node.args:
                found = at(node, ast.Call(func=load(node, MARK + "own"), args=[node], keywords=[]))
            return call(node, VALUE, spot.output, [found])
        spot = self._note("call", name, node, callee, has_input=True)
        return call(node, CALL, spot.input, [node.func, *node.args], node.keywords)

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
        return call(node, CALL, spot.input, [load(node, MARK + known[0]), *operands])

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
        if not isinstance(node.ctx, ast.Load):
            return node
        spot = self._note("operator", "getitem", node, has_input=True)
        operands = [load(node, GETITEM), node.value, index_of(node.slice)]
        return call(node, CALL, spot.input, operands)

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

    def visit_Assign(self, node: ast.Assign) -> list[ast.stmt]:
        self.generic_visit(node)
        return assign(node, self._pass(node))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        node.target = self.visit(node.target)
        if node.value is not None:
            node.value = self._pass(node)(bound_name(node.target), self.visit(node.value))
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> list[ast.stmt]:
        self.generic_visit(node)
        return assign_in_place(node, self._pass(node))

    def _pass(self, node: ast.stmt) -> Callable[[str, ast.expr], ast.expr]:
        return lambda base, value: self._value("variable", base, value, node)

    def visit_Return(self, node: ast.Return) -> ast.stmt:
        value: ast.expr = at(node, ast.Constant(value=None)) if node.value is None else self.visit(node.value)
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
            new = self.visit(part) if isinstance(part, ast.AST) else part
            if isinstance(new, list):
                found += new
            else:
                found.append(new)
        return found
