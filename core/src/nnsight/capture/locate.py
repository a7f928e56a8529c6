"""Finding the `with` item that a frame is entering, in its source, and making sure that it is that source."""

from __future__ import annotations

import ast
import dis
import itertools
import linecache
import sys
import tokenize
from collections.abc import Iterator
from types import CodeType, FrameType

from nnsight.errors import CaptureError

Span = tuple[int, int, int, int]  # lineno, end_lineno, col_offset, end_col_offset

_WAY_OUT = (
    "Blocks that wait for their turn need their source. A plain `with model.trace(input):` needs none: use one per "
    "input, or put this code in a file."
)
_NO_SOURCE = "The source of the block at {where} cannot be found (code from `exec`, stdin or a bare prompt has none). "
CHANGED = (
    "The source of the block at {where} is not what is running: the file has changed since it was imported. Reload the "
    "module (or restart), so that what runs is what is read."
)


def find_with(frame: FrameType) -> tuple[ast.With, int]:
    """Return the `with` statement that the source has where `frame` enters one, and the number of the item.

    Raises:
        CaptureError: there is no source, or it has no `with` statement there.
    """
    code = frame.f_code
    where = f"{code.co_filename}:{frame.f_lineno}"
    span = _span(code, frame.f_lasti)
    lines = _lines(frame)
    if not lines or span is None or span[0] > len(lines):
        raise CaptureError(_NO_SOURCE.format(where=where) + _WAY_OUT)
    for node in _candidates(lines, span):
        item = _item(node, span, code, frame.f_lasti)
        if item is not None:
            return node, item
    raise CaptureError(CHANGED.format(where=where))


def find_in(around: ast.AST, frame: FrameType) -> tuple[ast.With, int]:
    """Return the `with` statement, and the number of its item, that `frame` enters, in the source of its code."""
    code = frame.f_code
    span = _span(code, frame.f_lasti)
    if span is not None:
        for node in ast.walk(around):
            item = _item(node, span, code, frame.f_lasti) if isinstance(node, ast.With) else None
            if item is not None:
                return node, item  # type: ignore[return-value]
    raise AssertionError("code was compiled from source that it does not come from")


def find_around(frame: FrameType) -> ast.stmt | None:
    """Return the source of the function that a frame runs; None when it cannot be told."""
    lines = _lines(frame)
    for first in range(frame.f_code.co_firstlineno, len(lines) + 1):
        if lines[first - 1].lstrip().startswith(("def ", "async ")):  # before it are its decorators
            return _parse(lines, first, _last_line(lines, first))
    return None


def _span(code: CodeType, offset: int) -> Span | None:
    found = next(itertools.islice(code.co_positions(), offset // 2, None))
    return None if None in found else found  # type: ignore[return-value]


def _lines(frame: FrameType) -> list[str]:
    filename = frame.f_code.co_filename
    linecache.checkcache(filename)
    lines = linecache.getlines(filename, frame.f_globals)
    if not lines and filename == "<string>" and "-c" in sys.orig_argv:
        command = sys.orig_argv[sys.orig_argv.index("-c") + 1]
        lines = command.splitlines(keepends=True)
    return lines


def _candidates(lines: list[str], span: Span) -> Iterator[ast.With]:
    """Yield the `with` statements that may be at a position: of the statement (to 3.12.1), or of one of its items."""
    node = _parse(lines, span[0], span[1])
    if isinstance(node, ast.With) and _position(node) == span:
        yield node
        return
    for first in range(span[0], 0, -1):
        if lines[first - 1].lstrip().startswith("with"):
            node = _parse(lines, first, _last_line(lines, first))
            if isinstance(node, ast.With):
                yield node


def _parse(lines: list[str], first: int, last: int) -> ast.stmt | None:
    body = parse_lines("".join(lines[first - 1 : last]), first)
    return body[0] if body else None


def parse_lines(text: str, line: int) -> list[ast.stmt]:
    """Return the statements that whole lines are, at their place in the file; none where they are something else.

    Args:
        text: the lines, indented as they are there.
        line: the number of the first.
    """
    is_indented = text[:1].isspace()
    try:
        # Behind as many empty lines, so that it gets its place in the file; the first line is never indented.
        tree = ast.parse("\n" * (line - 2) + "if 1:\n" + text if is_indented else "\n" * (line - 1) + text)
    except (SyntaxError, ValueError):
        return []
    return tree.body[0].body if is_indented and isinstance(tree.body[0], ast.If) else tree.body


def _last_line(lines: list[str], first: int) -> int:
    """Return the last line of the compound statement that starts at line `first`."""
    depth, last = 0, first
    try:
        for token in tokenize.generate_tokens(iter(lines[first - 1 :]).__next__):
            if token.type == tokenize.INDENT:
                depth += 1
            elif token.type == tokenize.DEDENT:
                depth -= 1
                if depth <= (1 if lines[first - 1][:1].isspace() else 0):
                    break
            elif token.type == tokenize.NEWLINE:
                last = first + token.end[0] - 1
                if depth == 0 and not opens_body(lines, last):
                    break
    except (tokenize.TokenError, IndentationError):
        pass
    return last


def opens_body(lines: list[str], number: int) -> bool:
    """Return whether a logical line that ends at line `number` is the head of a compound statement."""
    return lines[number - 1].split("#")[0].rstrip().endswith(":")


def _item(node: ast.With, span: Span, code: CodeType, offset: int) -> int | None:
    """Return which item of `node` is at a position; None when none is."""
    for index, item in enumerate(node.items):
        if _position(item.context_expr) == span:
            return index
    if _position(node) != span:
        return None
    if len(node.items) == 1:
        return 0
    # Every item has the position of the statement: count the entries up to this one.
    enter = dis.opmap["BEFORE_WITH"]
    raw, positions = code.co_code, code.co_positions()
    entries = [i * 2 for i, position in enumerate(positions) if position == span and raw[i * 2] == enter]
    return entries.index(offset) % len(node.items) if offset in entries else None


def _position(node: ast.expr | ast.stmt) -> Span:
    assert node.end_lineno is not None and node.end_col_offset is not None
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset
