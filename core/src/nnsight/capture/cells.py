"""The cells a captured block reads and writes: its own for what it binds, the frame's where others share a variable."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any

from nnsight.capture.compiler import ENTERED, LOAD, Block
from nnsight.errors import CaptureError

_MISSING = object()
_IS_OPTIMIZED = 0x1  # CO_OPTIMIZED: locals are slots, so it is a function's frame


class Scope:
    """The variables of one captured block, taken from its frame at the moment it was entered.

    Attributes:
        block: what is captured.
        frame: where it is written; None when it is over.
        is_over: whether the block has ended, so that it will bind nothing more.
    """

    def __init__(self, block: Block, frame: FrameType, siblings: Sequence[Scope] = ()) -> None:
        self.block = block
        self.frame: FrameType | None = frame
        self.is_over = False
        self._siblings = [scope for scope in siblings if scope.frame is frame]
        names = (block.bound | block.loaded) - block.declared_global
        shared = frozenset().union(*(scope.block.bound for scope in self._siblings))
        self._values = _values(frame, names)
        self.live = _shared_names(frame, block)
        _check_deletions(frame, block, self._values)
        self._cells: dict[str, CellType] = {}
        self._marked = (block.loaded & shared & names) - self.live
        for name in names:
            if name in self.live:
                self._cells[name] = _frame_cell(frame, name)
            elif name in shared:
                self._cells[name] = CellType()
            elif name in self._values:
                self._cells[name] = CellType(self._values[name])
            elif name in block.bound or _is_local(frame.f_code, name):
                self._cells[name] = CellType()

    def function(self, entered: object, wait: Callable[[Scope, str], None]) -> Callable[[], None]:
        """Return the body as a function of no arguments.

        Args:
            entered: what `as` binds.
            wait: called with a sibling and a name that this block reads and the sibling may bind; returns when the
                sibling has bound it or is over.
        """
        cells = {**self._cells, ENTERED: CellType(entered), LOAD: CellType(self._loader(wait))}
        code = self.block.compile(frozenset(self._cells), self._marked)
        assert self.frame is not None
        closure = tuple(cells[name] for name in code.co_freevars)
        return FunctionType(code, self.frame.f_globals, code.co_name, None, closure)

    def again(self) -> Scope:
        """Return a scope with cells of its own and the same values at the start, to run the block once more."""
        new = Scope.__new__(Scope)
        new.__dict__.update(self.__dict__)
        new._cells = {
            name: cell if name in self.live else CellType(*([self._values[name]] if name in self._values else []))
            for name, cell in self._cells.items()
        }
        return new

    def has(self, name: str) -> bool:
        """Return whether the block has bound a name."""
        return _content(self._cells.get(name)) is not _MISSING

    def _loader(self, wait: Callable[[Scope, str], None]) -> Callable[[str], Any]:
        cells, siblings, values = self._cells, self._siblings, self._values

        def load(name: str) -> Any:
            found = _content(cells.get(name))
            for sibling in reversed(siblings):
                if found is not _MISSING:
                    return found
                if name in sibling.block.bound:
                    wait(sibling, name)
                    found = _content(sibling._cells.get(name))
            if found is _MISSING:
                found = values.get(name, _MISSING)
            if found is _MISSING:
                raise NameError(f"name {name!r} is not defined: no block before this one has bound it", name=name)
            return found

        return load

    def bindings(self) -> tuple[dict[str, Any], set[str]]:
        """Return what the block has bound, and which names it has deleted."""
        bound: dict[str, Any] = {}
        gone: set[str] = set()
        for name in self.block.bound - self.live:
            value = _content(self._cells.get(name))
            if value is _MISSING:
                if name in self.block.deleted and name in self._values:
                    gone.add(name)
            elif value is not self._values.get(name, _MISSING):
                bound[name] = value
        return bound, gone

    def close(self) -> None:
        """Refer to nothing any more."""
        self.is_over = True
        self.frame = None
        self._cells, self._values, self._siblings = {}, {}, []


def write_back(scopes: Sequence[Scope]) -> None:
    """Write what blocks have bound to the frames they are written in, in their order."""
    frames: dict[FrameType, tuple[dict[str, Any], set[str]]] = {}
    for scope in scopes:
        if scope.frame is None:
            continue
        bound, gone = scope.bindings()
        values, removed = frames.setdefault(scope.frame, ({}, set()))
        values.update(bound)
        removed.difference_update(bound)
        removed |= gone
        for name in gone:
            values.pop(name, None)
    for frame, (values, removed) in frames.items():
        if values or removed:
            _store(frame, values, removed)


def bind(scope: Scope, entered: Any) -> None:
    """Bind in the frame what the `as` of a captured item binds."""
    if scope.frame is None:
        return
    values: dict[str, Any] = {}

    def walk(target: Any, value: Any) -> None:
        if isinstance(target, str):
            values[target] = value
        elif isinstance(target, list):
            for inner, item in zip(target, value, strict=True):
                walk(inner, item)

    walk(scope.block.target, entered)
    if values:
        _store(scope.frame, values, set())


def _store(frame: FrameType, values: dict[str, Any], removed: set[str]) -> None:
    namespace = frame.f_locals
    namespace.update(values)
    for name in removed:
        namespace.pop(name, None)
    if frame.f_code.co_flags & _IS_OPTIMIZED and sys.version_info < (3, 13):
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(1))
        namespace.clear()  # the frame keeps this dict, and with it everything in it, until it returns


def _values(frame: FrameType, names: frozenset[str]) -> dict[str, Any]:
    """Return the values that a frame has for some names."""
    namespace = frame.f_locals
    found = {name: namespace[name] for name in names if name in namespace}
    if frame.f_code.co_flags & _IS_OPTIMIZED and sys.version_info < (3, 13):
        namespace.clear()
    return found


def _check_deletions(frame: FrameType, block: Block, values: dict[str, Any]) -> None:
    lost = sorted(name for name in block.deleted if name in values)
    if lost and frame.f_code.co_flags & _IS_OPTIMIZED and sys.version_info >= (3, 13):
        raise CaptureError(
            f"`del {lost[0]}` in the block at {block.where} cannot reach the function around it: Python 3.13 lets "
            "nobody else delete a function's variable. Delete it after the block."
        )


def _is_local(code: CodeType, name: str) -> bool:
    return name in code.co_varnames or name in code.co_cellvars or name in code.co_freevars


def _content(cell: CellType | None) -> Any:
    try:
        return _MISSING if cell is None else cell.cell_contents
    except ValueError:
        return _MISSING


def _shared_names(frame: FrameType, block: Block) -> frozenset[str]:
    """Return the names whose one cell must be used: those that functions outside the block share with it.

    A variable that such a function only reads, and the block does not bind, is taken at its value on entry: a loop's
    turns stay apart.
    """
    code = frame.f_code
    if not code.co_cellvars and not code.co_freevars:
        return frozenset()
    names = block.bound | block.loaded
    live = names & frozenset(code.co_freevars)
    first, last = block.node.lineno, block.node.end_lineno or block.node.lineno
    for inner in code.co_consts:
        if isinstance(inner, CodeType) and not first <= inner.co_firstlineno <= last:
            used = names & frozenset(inner.co_freevars) & frozenset(code.co_cellvars)
            live |= {name for name in used if name in block.bound or _stores(inner, name)}
    return live


def _stores(code: CodeType, name: str) -> bool:
    """Return whether a function, or one inside it, binds a variable of the function around it."""
    import dis

    if name not in code.co_freevars:
        return False
    if any(step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval == name for step in dis.get_instructions(code)):
        return True
    return any(_stores(inner, name) for inner in code.co_consts if isinstance(inner, CodeType))


# Where a frame's variables are: offset of the interpreter frame in a frame object, of the code and of the variables in
# it (Include/internal/pycore_frame.h of 3.11, 3.12 and 3.13).
_FRAME = 24
_CODE = 32 if sys.version_info < (3, 12) else 0
_VARIABLES = 72


def _frame_cell(frame: FrameType, name: str) -> CellType:
    """Return the cell in which a running function keeps a variable that it shares with its inner functions."""
    code = frame.f_code
    names = [*code.co_varnames, *(n for n in code.co_cellvars if n not in code.co_varnames), *code.co_freevars]
    word = ctypes.c_void_p
    inner = word.from_address(id(frame) + _FRAME).value
    if sys.version_info < (3, 14) and inner and word.from_address(inner + _CODE).value == id(code):
        slot = word.from_address(inner + _VARIABLES + 8 * names.index(name)).value
        if slot and word.from_address(slot + 8).value == id(CellType):
            cell: CellType = ctypes.cast(slot, ctypes.py_object).value
            return cell
    raise CaptureError(
        f"The variable {name!r} is shared with a function outside of this block, and this interpreter does not show "
        "where it keeps it. Keep the value in a list or another object that both use."
    )
