"""A model whose code says what it computes, made without the library under test.

The whole file that defines a model is parsed, every expression in its functions is passed to a recorder, and the file
is executed once more beside the original. What the recorder is given is what the plain model computes.
"""

from __future__ import annotations

import ast
import sys
import types
from collections import defaultdict

import torch

OPERATORS = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.MatMult: "matmul", ast.Div: "div", ast.Mod: "mod",
    ast.FloorDiv: "floordiv", ast.Pow: "pow", ast.LShift: "lshift", ast.RShift: "rshift", ast.BitAnd: "bitand",
    ast.BitOr: "bitor", ast.BitXor: "bitxor", ast.USub: "neg", ast.UAdd: "pos", ast.Invert: "invert", ast.Lt: "lt",
    ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Eq: "eq", ast.NotEq: "ne",
}  # fmt: skip
RECORD = "__record__"


class _Recording(ast.NodeTransformer):
    """Passes what the functions of a file compute to the recorder: the kind, a word on it, and where it stands."""

    def __init__(self):
        self.functions = []

    def _noted(self, node, kind, word, value):
        function = self.functions[0] if self.functions else ""
        where = kind, word, node.lineno, node.col_offset, node.end_lineno, node.end_col_offset
        arguments = [ast.Constant(item) for item in (function, *where)]
        return ast.Call(ast.Name(RECORD, ast.Load()), [*arguments, value], [])

    def visit_FunctionDef(self, node):
        self.functions.append(node.name)
        node.body = [new for one in node.body for new in self._statements(one)]
        self.functions.pop()
        return node

    def _statements(self, node):
        new = self.visit(node)
        return new if isinstance(new, list) else [new]

    def visit_arguments(self, node):
        return node

    def visit_Call(self, node):
        if not self.functions:
            return node
        word = ast.unparse(node.func)
        self.generic_visit(node)
        return self._noted(node, "call", word, node)

    def visit_BinOp(self, node):
        return self._operator(node, type(node.op), [node.left, node.right])

    def visit_UnaryOp(self, node):
        return self._operator(node, type(node.op), [node.operand])

    def visit_Compare(self, node):
        return self._operator(node, type(node.ops[0]) if len(node.ops) == 1 else None, [node.left, *node.comparators])

    def visit_Subscript(self, node):
        return self._operator(node, None, [])

    def _operator(self, node, kind, operands):
        is_constant = operands and all(isinstance(operand, ast.Constant) for operand in operands)
        self.generic_visit(node)
        word = "getitem" if isinstance(node, ast.Subscript) else OPERATORS.get(kind)
        is_read = isinstance(getattr(node, "ctx", None), ast.Load | None)
        if not self.functions or word is None or is_constant or not is_read:
            return node
        return self._noted(node, "operator", word, node)

    def visit_Assign(self, node):
        single = node.targets[0]
        is_single = len(node.targets) == 1 and not isinstance(single, ast.Tuple | ast.List)
        bound = []
        for one in (leaf for target in node.targets for leaf in _bound(target)):
            number = sum(word.partition("#")[0] == word_of(one) for word, _ in bound)  # `_, _, x = ...`
            bound.append((word_of(one) + (f"#{number}" if number else ""), ast.unparse(one)))
        self.generic_visit(node)
        if not self.functions:
            return node
        if is_single:
            node.value = self._noted(node, "variable", bound[0][0], node.value)
            return node
        return [node, *(self._after(node, word, text) for word, text in bound)]

    def _after(self, node, word, text):
        """Record what was bound, by reading it once more."""
        return ast.Expr(self._noted(node, "variable", word, ast.parse(text, mode="eval").body))

    def visit_AnnAssign(self, node):
        if node.value is not None and self.functions:
            node.value = self._noted(node, "variable", word_of(node.target), self.visit(node.value))
        return node

    def visit_AugAssign(self, node):
        word, text = word_of(node.target), ast.unparse(node.target)
        self.generic_visit(node)
        return [node, self._after(node, word, text)] if self.functions else node

    def visit_NamedExpr(self, node):
        self.generic_visit(node)
        if self.functions:
            node.value = self._noted(node, "variable", node.target.id, node.value)
        return node

    def visit_Return(self, node):
        value = ast.Constant(None) if node.value is None else self.visit(node.value)
        node.value = self._noted(node, "return", "", value) if len(self.functions) == 1 else value
        return node


def _bound(target):
    if isinstance(target, ast.Tuple | ast.List):
        return [one for part in target.elts for one in _bound(part)]
    return [target.value if isinstance(target, ast.Starred) else target]


def word_of(target):
    """Return what a variable is called."""
    if isinstance(target, ast.Subscript):
        return f"item_{word_of(target.value).removeprefix('item_')}"
    return ast.unparse(target).replace(".", "_")


class Recorder:
    """What a model computed, by the module and the function it was computed for, and where in the file."""

    def __init__(self):
        self.modules = {}
        self.found = defaultdict(list)

    def watch(self, model):
        """Note what a model's modules compute from now on."""
        self.modules = {id(module): path for path, module in model.named_modules()}
        self.found.clear()

    def __call__(self, function, kind, word, line, column, end_line, end_column, value):
        frame = sys._getframe(1)
        while frame.f_code.co_name != function and frame.f_back is not None:  # out of comprehensions and the like
            frame = frame.f_back
        names = frame.f_locals
        path = self.modules.get(id(names.get("self", names.get("module"))))
        if path is not None:
            self.found[path, function, kind, (line, column, end_line, end_column), word].append(copied(value))
        return value


def copied(value):
    """Return a value with its tensors copied, so that in-place changes made later do not reach it."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list) or type(value).__module__ == "torch.return_types":
        return type(value)(copied(item) for item in value)
    return value


def instrumented(kind):
    """Return a class once more from its file, with every function of the file recording, and the recorder."""
    module = sys.modules[kind.__module__]
    with open(module.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    tree = ast.fix_missing_locations(_Recording().visit(tree))
    # A name of its own: transformers keeps what it knows of a class by the name.
    made, recorder = types.ModuleType(f"recording.{module.__name__}"), Recorder()
    made.__dict__.update(__file__=module.__file__, __package__=module.__package__, **{RECORD: recorder})
    sys.modules[made.__name__] = made  # where type hints of its classes are looked up
    exec(compile(tree, module.__file__, "exec"), made.__dict__)
    return getattr(made, kind.__name__), recorder
