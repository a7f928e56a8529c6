"""The text of functions, lambdas and classes, found where their code says it is, and compiled again.

What is found is compiled and compared with what runs, so a file that has changed since is an error, not a guess. The
text keeps its place in the file: tracebacks and warnings from another process point there.
"""

from __future__ import annotations
import __future__ as future

import ast
import functools
import linecache
import sys
import tokenize
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nnsight.capture.compiler import class_node, function_node, owner_class
from nnsight.capture.locate import opens_body, parse_lines
from nnsight.capture.names import mangle
from nnsight.capture.percode import PerCode
from nnsight.capture.verify import differs

FUTURES = {name: getattr(future, name).compiler_flag for name in future.all_feature_names}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef

NO_SOURCE = "whose source cannot be found (code from `exec`, stdin or a bare prompt has none): put it in a file"
CHANGED = "whose source has changed since it was imported: reload the module (or restart), so that what runs is read"
#: For `differs`: all of a code object is compared, also what is behind the end of what its text is now.
ALL = ast.Pass(lineno=1, col_offset=0, end_lineno=1 << 30, end_col_offset=1 << 30)
_known: PerCode[Source] = PerCode()


class NoSourceError(Exception):
    """The source of a function or class is not to be had; says why, as the end of a sentence."""


@dataclass(frozen=True, slots=True)
class Source:
    """The text of one definition.

    Attributes:
        filename: the file it is from.
        line: the number of its first line there.
        column: where in that line the text begins: a lambda is a part of a line, anything else is whole lines.
        text: the text.
        owner: the class around it that mangles its names, '' for none.
        futures: the names imported from `__future__` where it is.
        is_lambda: whether the text is that of a lambda.
    """

    filename: str
    line: int
    column: int
    text: str
    owner: str
    futures: tuple[str, ...]
    is_lambda: bool

    def data(self) -> list[Any]:
        """Return it as JSON has it."""
        return [
            self.filename, self.line, self.column, self.text, self.owner, list(self.futures), self.is_lambda,
        ]  # fmt: skip


def source_lines(filename: str, namespace: dict[str, Any] | None = None) -> list[str]:
    """Return the lines of a file, a cell of a notebook or a `-c` command; an empty list where there are none."""
    linecache.checkcache(filename)
    lines = linecache.getlines(filename, namespace)
    if not lines and filename == "<string>" and "-c" in sys.orig_argv:
        lines = sys.orig_argv[sys.orig_argv.index("-c") + 1].splitlines(keepends=True)
    return lines


def remember_lines(filename: str, line: int, text: str) -> None:
    """Let tracebacks show lines of a file that is not to be had here, with those that are known of it already."""
    known = linecache.cache.get(filename)
    lines = list(known[2]) if known is not None and len(known) > 2 else []
    new = text.splitlines(keepends=True)
    lines += ["\n"] * (line - 1 + len(new) - len(lines))
    lines[line - 1 : line - 1 + len(new)] = new
    linecache.cache[filename] = (sum(map(len, lines)), None, lines, filename)


# -- functions


def function_source(function: types.FunctionType) -> Source:
    """Return the source of a function or lambda.

    Raises:
        NoSourceError: it is not to be had.
    """
    code = function.__code__
    known = _known.of(code)
    found = known.get(None)
    if found is None:
        found = known[None] = _find_function(code, function.__globals__)
    return found


def _find_function(code: types.CodeType, namespace: dict[str, Any]) -> Source:
    lines = source_lines(code.co_filename, namespace)
    is_lambda = code.co_name == "<lambda>"
    is_changed = False
    for node in _lambdas(lines, code) if is_lambda else _definitions(lines, code):
        source = _cut(node, lines, code)
        try:
            compiled = compile_function(source, code.co_freevars)
        except (SyntaxError, LookupError):
            continue
        if sorted(compiled.co_freevars) == sorted(code.co_freevars) and not differs(code, compiled, [node, ALL]):
            return source
        is_changed = True
    raise NoSourceError(CHANGED if is_changed or lines else NO_SOURCE)


def _definitions(lines: list[str], code: types.CodeType) -> Iterable[Definition]:
    """Yield the `def` whose first line (of its decorators) is that of some code."""
    first = code.co_firstlineno
    if not 1 <= first <= len(lines):
        return
    last = _last_line(lines, first)
    node = parse_one("".join(lines[first - 1 : last]), first)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == code.co_name:
        yield node


def _lambdas(lines: list[str], code: types.CodeType) -> Iterable[Definition]:
    """Yield the lambdas of a file that are where some code is."""
    places = [place for place in code.co_positions() if None not in place]
    inner = [(line, column) for line, last, column, end in places if (line, column) != (last, end)]
    tree = parse_file("".join(lines))
    if tree is None or not inner:
        return
    start: Any = min(inner)
    for node in ast.walk(tree):
        if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno:
            begin = node.body.lineno, node.body.col_offset
            end = node.body.end_lineno or 0, node.body.end_col_offset or 0
            if begin <= start < end:
                yield node


def _cut(node: Definition, lines: list[str], code: types.CodeType) -> Source:
    owner = owner_class(code) if _is_private(node) else ""
    futures = tuple(name for name, flag in FUTURES.items() if code.co_flags & flag)
    end = node.end_lineno or node.lineno
    if isinstance(node, ast.Lambda):
        own = [line.encode() for line in lines[node.lineno - 1 : end]]
        own[-1] = own[-1][: node.end_col_offset]
        own[0] = own[0][node.col_offset :]
        text = b"".join(own).decode()
        return Source(code.co_filename, node.lineno, node.col_offset, text, owner, futures, True)
    return Source(code.co_filename, node.lineno, 0, "".join(lines[node.lineno - 1 : end]), owner, futures, False)


def _is_private(node: ast.AST) -> bool:
    """Return whether a definition uses names that a class around it would change."""
    for inner in ast.walk(node):
        for field in ("id", "attr", "name", "arg"):
            name = getattr(inner, field, None)
            if isinstance(name, str) and mangle(name, "X") != name:
                return True
    return False


def compile_function(source: Source, free: Sequence[str]) -> types.CodeType:
    """Return the code of a function from its source, without its decorators, defaults and annotations.

    Args:
        source: of a function.
        free: the names that it takes from a function around it.

    Raises:
        SyntaxError: the text does not parse.
        LookupError: it is not that of a function.
    """
    node = parse_source(source)
    inner: ast.stmt
    name = "<lambda>"
    if isinstance(node, ast.Lambda):
        _strip(node.args)
        inner = ast.copy_location(ast.Return(value=node), node)
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        _strip(node.args)
        node.decorator_list, node.returns = [], None
        name, node.name = node.name, "@function"  # else it could not call what its file has under its name
        if sys.version_info >= (3, 12):
            node.type_params = []
        inner = node
    else:
        raise LookupError("the source of a function is none")
    return compile_within([inner], source, free, depth=1).replace(co_name=name)


def compile_within(body: list[ast.stmt], source: Source, free: Sequence[str], depth: int) -> types.CodeType:
    """Compile statements in a function whose arguments are `free`; return the code `depth` levels below it."""
    place = {"lineno": source.line, "col_offset": 0, "end_lineno": source.line, "end_col_offset": 0}
    statements: list[ast.stmt] = [function_node("factory", list(free), body, place)]
    if source.owner:
        statements = [class_node(source.owner, statements, place)]
        depth += 1
    flags = functools.reduce(lambda found, name: found | FUTURES[name], source.futures, 0)
    tree = ast.Module(body=statements, type_ignores=[])
    code: types.CodeType = compile(tree, source.filename, "exec", flags, dont_inherit=True)
    for _ in range(depth + 1):
        code = next(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return code


def _strip(arguments: ast.arguments) -> None:
    """Drop defaults and annotations: the values travel, and annotations are not looked at."""
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    for argument in every:
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.copy_location(ast.Constant(None), default) for default in arguments.defaults]
    arguments.kw_defaults = [
        default and ast.copy_location(ast.Constant(None), default) for default in arguments.kw_defaults
    ]


# -- text


def parse_source(source: Source) -> ast.AST:
    """Return the one node that a source is, at its place.

    Raises:
        SyntaxError: it does not parse.
    """
    if not source.is_lambda:
        node = parse_one(source.text, source.line)
        if node is None:
            raise SyntaxError(f"the source from {source.filename}:{source.line} is not one definition")
        return node
    found = ast.parse(f"({source.text}\n)", mode="eval").body
    for inner in ast.walk(found):
        _shift(inner, source.line - 1, source.column - 1)
    return found


def _shift(node: ast.AST, lines: int, columns: int) -> None:
    """Move a node that was parsed on its own to its place."""
    if hasattr(node, "lineno"):
        for line, column in (("lineno", "col_offset"), ("end_lineno", "end_col_offset")):
            if getattr(node, line) == 1:
                setattr(node, column, max(getattr(node, column) + columns, 0))
            setattr(node, line, getattr(node, line) + lines)


def parse_one(text: str, line: int) -> ast.stmt | None:
    """Return the one statement that whole lines are, at its place in the file; None where they are something else."""
    body = parse_lines(text, line)
    return body[0] if len(body) == 1 else None


@functools.lru_cache(maxsize=8)
def parse_file(text: str) -> ast.Module | None:
    """Return the syntax tree of a file, not to be changed; None where it has none."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _last_line(lines: list[str], first: int) -> int:
    """Return the last line of the definition that starts at line `first`, decorators included."""
    depth, last, is_begun = 0, first, False
    try:
        for token in tokenize.generate_tokens(iter(lines[first - 1 :]).__next__):
            if token.type == tokenize.INDENT:
                depth += 1
            elif token.type == tokenize.DEDENT:
                depth -= 1
                if is_begun and depth <= (1 if lines[first - 1][:1].isspace() else 0):
                    break
            elif token.type == tokenize.NAME and token.string in ("def", "class"):
                is_begun = True
            elif token.type == tokenize.NEWLINE:
                last = first + token.end[0] - 1
                at_start = depth == (1 if lines[first - 1][:1].isspace() else 0)
                if is_begun and at_start and not opens_body(lines, last):
                    break
    except (tokenize.TokenError, IndentationError):
        pass
    return last
