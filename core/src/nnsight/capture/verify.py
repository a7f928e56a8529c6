"""Whether the source found is the source of the running code: both as bytecode, compared instruction by instruction.

How a name is stored (fast, cell, global) depends on the function around the block, so instructions are compared by
what they do to which name or constant, and where. Statements that a test runner rewrites (`assert`) are passed over.
"""

from __future__ import annotations

import ast
import dis
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any

_IGNORED = {
    "CACHE", "RESUME", "NOP", "PUSH_NULL", "PRECALL", "MAKE_CELL", "COPY_FREE_VARS", "EXTENDED_ARG",
    "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "LOAD_CLOSURE", "BUILD_TUPLE", "MAKE_FUNCTION",
    "SET_FUNCTION_ATTRIBUTE", "COPY", "SWAP", "LOAD_FAST_AND_CLEAR", "RETURN_VALUE", "RETURN_CONST", "POP_TOP",
}  # fmt: skip
_NAMED = {f"{kind}_{where}" for kind in ("LOAD", "STORE", "DELETE") for where in ("NAME", "GLOBAL")}
_trusted: set[int] = set()
_kept: list[CodeType] = []

Step = tuple[int | None, int | None, str, Any]


def trust(code: CodeType) -> None:
    """Take code that was compiled from source that had been verified as verified."""
    _trusted.add(id(code))
    _kept.append(code)


def differs(code: CodeType, node: ast.With, filename: str) -> bool:
    """Return whether the block in `code` at the place of `node` is something else than `node`."""
    if id(code) in _trusted:
        return False
    first, last = node.lineno, node.end_lineno or node.lineno
    asserts = {
        line
        for inner in ast.walk(node)
        if isinstance(inner, ast.Assert)
        for line in range(inner.lineno, (inner.end_lineno or inner.lineno) + 1)
    }
    compiled = _compile(code, node, filename)
    running = [step for step in _steps(code, first, last, node.col_offset) if step[0] not in asserts]
    expected = [step for step in _steps(compiled, first, last, node.col_offset) if step[0] not in asserts]
    return sorted(map(repr, running)) != sorted(map(repr, expected))


def _compile(code: CodeType, node: ast.With, filename: str) -> CodeType:
    """Compile the statement alone, with its names stored as the running code stores them."""
    loop = ast.While(test=ast.Constant(value=True), body=[node], orelse=[])  # the block may `break` out of one
    body: list[ast.stmt] = [loop]
    depth = 0
    if code.co_flags & 0x1:  # CO_OPTIMIZED: a function's code
        own = [name for name in (*code.co_varnames, *code.co_cellvars) if name.isidentifier()]
        kind = ast.AsyncFunctionDef if code.co_flags & 0x80 else ast.FunctionDef
        body = [function_node("f", list(dict.fromkeys(own)), body, kind)]
        body = [function_node("outer", [name for name in code.co_freevars if name != "__class__"], body)]
        depth = 2
    owner = owner_class(code)
    if owner:
        body = [class_node(owner, body)]
        depth += 1
    tree = ast.fix_missing_locations(ast.Module(body=body, type_ignores=[]))
    found = compile(tree, filename, "exec", flags=code.co_flags & future_flags(), dont_inherit=True)
    for _ in range(depth):
        found = next(constant for constant in found.co_consts if isinstance(constant, CodeType))
    return found


def function_node(
    name: str, arguments: list[str], body: list[ast.stmt],
    kind: type[ast.FunctionDef] | type[ast.AsyncFunctionDef] = ast.FunctionDef,
) -> ast.FunctionDef | ast.AsyncFunctionDef:  # fmt: skip
    """Return the definition of a function with positional arguments."""
    taken = [ast.arg(arg=argument) for argument in arguments]
    signature = ast.arguments(posonlyargs=[], args=taken, kwonlyargs=[], kw_defaults=[], defaults=[])
    node = kind(name=name, args=signature, body=body, decorator_list=[], returns=None)
    if sys.version_info >= (3, 12):
        node.type_params = []
    return node


def class_node(name: str, body: list[ast.stmt]) -> ast.ClassDef:
    """Return the definition of a class; names in it are mangled with its name."""
    node = ast.ClassDef(name=name, bases=[], keywords=[], body=body, decorator_list=[])
    if sys.version_info >= (3, 12):
        node.type_params = []
    return node


def owner_class(code: CodeType) -> str:
    """Return the name of the innermost class around a code object, for name mangling; '' when there is none."""
    parts = code.co_qualname.split(".")
    for inner, outer in zip(parts[::-1], parts[-2::-1], strict=False):
        if outer != "<locals>" and inner != "<locals>":
            return outer
    return ""


def future_flags() -> int:
    """Return the mask of the compiler flags that `from __future__` sets."""
    import __future__

    mask = 0
    for name in __future__.all_feature_names:
        mask |= getattr(__future__, name).compiler_flag
    return mask


def _steps(code: CodeType, first: int, last: int, column: int) -> Iterator[Step]:
    """Yield what the instructions of the given lines do, in a form that does not depend on how names are stored."""
    for step in dis.get_instructions(code):
        place = step.positions
        if place is None or place.lineno is None or not first <= place.lineno <= last:
            continue
        if step.opname in _IGNORED or (place.lineno == first and (place.col_offset or 0) < column):
            continue
        value = step.argval
        if isinstance(value, CodeType):
            yield from _steps(value, first, last, 0)
        elif step.opname == "LOAD_CONST" and value == code.co_qualname:
            continue  # a class knows where it was defined
        elif step.opcode in dis.haslocal or step.opcode in dis.hasfree or step.opname in _NAMED:
            kinds = [part for part in step.opname.split("_") if part in ("LOAD", "STORE", "DELETE")]
            names = value if isinstance(value, tuple) else (value,)
            for kind, name in zip(kinds, names, strict=False):
                yield place.lineno, None, kind, name
        else:
            yield place.lineno, place.col_offset, *_plain(step)


def _plain(step: dis.Instruction) -> tuple[str, Any]:
    """Return an instruction's kind and argument without what depends on where it stands."""
    name = step.opname
    if "JUMP" in name or name in ("FOR_ITER", "SEND"):
        return name.replace("_BACKWARD", "").replace("_FORWARD", ""), None
    if name == "LOAD_METHOD":
        name = "LOAD_ATTR"  # which of the two depends on whether the module imports the name
    return name, step.argrepr if name == "KW_NAMES" else step.argval
