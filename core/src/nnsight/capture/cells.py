"""The cells a captured block reads and writes: its own for what it binds, the frame's where others share a variable."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from types import CellType, FrameType, FunctionType
from typing import Any

from nnsight.capture.compiler import ENTERED, Block
from nnsight.capture.plan import plan_of
from nnsight.capture.rewrite import LOAD
from nnsight.capture.verify import variables
from nnsight.errors import CaptureError

_MISSING = object()
_NOTHING: frozenset[str] = frozenset()
_IS_OPTIMIZED = 0x1  # CO_OPTIMIZED: locals are slots, so it is a function's frame


class Scope:
    """The variables of one captured block, taken from its frame at the moment it was entered.

    Args:
        block: what is captured.
        frame: where it is written.
        previous: the block before it in the same frame, whose names it may read.

    Attributes:
        frame: where it is written; None when it is over.
        is_over: whether the block has ended, so that it will bind nothing more.
        reach: the names that this block and those before it bind.
    """

    _owner: weakref.ref[Any] | None = None
    _owned: Collection[str] = ()

    def __init__(self, block: Block, frame: FrameType, previous: Scope | None = None) -> None:
        self.block = block
        self.frame: FrameType | None = frame
        self.is_over = False
        self.previous = previous
        self._globals = frame.f_globals
        self._values = _values(frame, block.variables if block.is_function else block.names)
        if block.deleted:
            _check_deletions(block, self._values)
        #: The cells of the frame that are known so far: blocks of one frame share them.
        self._frame_cells: dict[str, CellType] = {} if previous is None else previous._frame_cells
        self._live = {name: self._frame_cell(name) for name in block.live} if block.live else {}
        reach = previous.reach if previous is not None else _NOTHING
        if block.is_nested:
            self._read_around(frame, block.exposed - reach)
        self._plan = plan_of(block, reach, self._values)
        self.reach: frozenset[str] = self._plan.reach
        self._cells = self._fresh_cells()

    @classmethod
    def of_values(
        cls, block: Block, namespace: dict[str, Any], values: dict[str, Any], live: dict[str, CellType]
    ) -> Scope:
        """Return a scope that is taken from no frame.

        Args:
            block: what is captured.
            namespace: the globals of its file.
            values: what variables of the function around it are bound to.
            live: the variables that functions outside of the block share with it.
        """
        new = cls.__new__(cls)
        new.block, new.frame, new.is_over, new.previous = block, None, False, None
        new._globals, new._values, new._live, new._frame_cells = namespace, values, live, {}
        new._plan = plan_of(block, _NOTHING, values)
        new.reach = new._plan.reach
        new._cells = new._fresh_cells()
        return new

    def _read_around(self, frame: FrameType, names: frozenset[str]) -> None:
        """Ask for the names that the block around this one reads from others, now: later it cannot be left to wait."""
        load = _outer_load(frame)
        if load is None:
            return
        for name in names & load.names:
            if name not in self._values and name not in self._live:
                with contextlib.suppress(NameError):
                    self._values[name] = load(name)

    def _fresh_cells(self) -> dict[str, CellType]:
        """Return the cells at the start: empty for what the block binds, so that it shows when it has."""
        values, plan = self._values, self._plan
        cells = dict(self._live)
        for name in plan.given:
            cells[name] = CellType(values[name])
        for name in plan.empty:
            cells[name] = CellType()
        return cells

    def _frame_cell(self, name: str) -> CellType:
        """Return the cell in which the running function keeps a variable that it shares with its inner functions."""
        found = self._frame_cells.get(name)
        if found is None:
            assert self.frame is not None
            found = self._frame_cells[name] = _frame_cell(self.frame, name)
        return found

    def function(self, entered: object, wait: Callable[[Scope, str], None]) -> Callable[[], None]:
        """Return the body as a function of no arguments.

        Args:
            entered: what `as` binds.
            wait: called with a sibling and a name that this block reads and the sibling may bind; returns when the
                sibling has bound it or is over.
        """
        plan, code = self._plan, self._plan.compile(self.block)
        cells = {**self._cells, ENTERED: CellType(entered)}
        if plan.loads:
            cells[LOAD] = CellType(Loader(self, plan.marked, wait))
        closure = tuple([cells[name] for name in code.co_freevars])
        return FunctionType(code, self._globals, code.co_name, None, closure)

    def again(self) -> Scope:
        """Return a scope with cells of its own and the same values at the start, to run the block once more."""
        new = Scope.__new__(Scope)
        new.__dict__.update(self.__dict__)
        if self._owner is not None:
            new._values = {**self._values, **dict.fromkeys(self._owned, self._owner())}
        new._cells = new._fresh_cells()
        return new

    def outside(self) -> tuple[dict[str, Any], dict[str, CellType], dict[str, Any]]:
        """Return where the block takes its names from.

        Returns:
            What it may read of the function (or class, or module) around it, the variables that it shares with other
            functions, and the globals.
        """
        names = self.block.exposed
        if "__class__" in self._live:
            names |= {self.block.first}  # `super()` reads it, and does not say so
        return {name: value for name, value in self._values.items() if name in names}, self._live, self._globals

    def outlive(self, owner: object, stand_in: Callable[[Any], Any]) -> None:
        """Let go of the frame, since nothing will be written back.

        Args:
            owner: what will hold this scope, and is referred to weakly.
            stand_in: returns what to refer to instead of a value that holds the owner; other values as they are.
        """
        self.frame = None
        self._values = {name: stand_in(value) for name, value in self._values.items()}
        self._owned = {name for name, value in self._values.items() if value is owner}
        self._owner = weakref.ref(owner)
        self._values = {name: value for name, value in self._values.items() if name not in self._owned}
        self._cells, self._frame_cells = {}, {}

    def has(self, name: str) -> bool:
        """Return whether the block has bound a name."""
        return self.content(name) is not _MISSING

    def content(self, name: str) -> Any:
        """Return what the block has bound a name to, or a value that stands for nothing."""
        return _content(self._cells.get(name))

    def initial(self, name: str) -> Any:
        """Return the frame's value of a name, or a value that stands for nothing."""
        return self._values.get(name, _MISSING)

    def bindings(self) -> tuple[dict[str, Any], set[str]]:
        """Return what the block has bound, and which names it has deleted."""
        bound: dict[str, Any] = {}
        gone: set[str] = set()
        deleted = self.block.deleted
        for name in self.block.bound - self.block.live:
            value = _content(self._cells.get(name))
            if value is not _MISSING:
                bound[name] = value
            elif name in deleted and name in self._values:
                gone.add(name)
        return bound, gone

    def give(self, values: dict[str, Any]) -> None:
        """Bind names of the block where it is written, as if the block had run there and bound them."""
        for name, value in values.items():
            if name in self.block.declared_global:
                self._globals[name] = value
            else:
                self._cells[name].cell_contents = value
        write_back([self])

    def close(self) -> None:
        """Refer to nothing any more."""
        self.is_over = True
        self.frame = None
        self.previous = None
        self._cells, self._values, self._live, self._frame_cells = {}, {}, {}, {}


class Loader:
    """Reads names that several may bind: the block itself, those before it, the frame.

    Attributes:
        names: the names that are read so.
    """

    __slots__ = ("_scope", "_wait", "names")

    def __init__(self, scope: Scope, names: frozenset[str], wait: Callable[[Scope, str], None]) -> None:
        self._scope = scope
        self._wait = wait
        self.names = names

    def __call__(self, name: str) -> Any:
        scope = self._scope
        found = scope.content(name)
        before = scope.previous
        while found is _MISSING and before is not None:
            if name in before.block.bound:
                self._wait(before, name)
                found = before.content(name)
            before = before.previous
        if found is _MISSING:
            found = scope.initial(name)
        if found is _MISSING:
            raise NameError(f"name {name!r} is not defined: no block before this one has bound it", name=name)
        return found


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
    values = dict(_bound(scope.block.target, entered))
    if values:
        _store(scope.frame, values, set())


def _bound(target: Any, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(target, str):
        yield target, value
    elif isinstance(target, list):
        for inner, item in zip(target, value, strict=True):
            yield from _bound(inner, item)


def _store(frame: FrameType, values: dict[str, Any], removed: set[str]) -> None:
    namespace = frame.f_locals
    namespace.update(values)
    for name in removed:
        namespace.pop(name, None)
    if frame.f_code.co_flags & _IS_OPTIMIZED and sys.version_info < (3, 13):
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(bool(removed)))
        namespace.clear()  # the frame keeps this dict, and with it everything in it, until it returns


def _values(frame: FrameType, names: frozenset[str]) -> dict[str, Any]:
    """Return the values that a frame has for some names."""
    namespace = frame.f_locals
    found = {name: namespace[name] for name in names if name in namespace}
    if frame.f_code.co_flags & _IS_OPTIMIZED and sys.version_info < (3, 13):
        namespace.clear()
    return found


def _check_deletions(block: Block, values: dict[str, Any]) -> None:
    lost = sorted(name for name in block.deleted if name in values and name not in block.live)
    if lost and block.is_function and sys.version_info >= (3, 12):
        raise CaptureError(
            f"`del {lost[0]}` in the block at {block.where} cannot reach the function around it: from Python 3.12 on "
            "nobody else can delete a function's variable. Delete it after the block."
        )


def _outer_load(frame: FrameType) -> Loader | None:
    """Return what the captured block around this one reads names with that others may bind."""
    found: Loader | None = _values(frame, frozenset({LOAD})).get(LOAD)
    return found


def _content(cell: CellType | None) -> Any:
    try:
        return _MISSING if cell is None else cell.cell_contents
    except ValueError:
        return _MISSING


# Where a frame's variables are: offset of the interpreter frame in a frame object, of the code and of the variables in
# it (Include/internal/pycore_frame.h of 3.11, 3.12 and 3.13).
_FRAME = 24
_CODE = 32 if sys.version_info < (3, 12) else 0
_VARIABLES = 72


def _frame_cell(frame: FrameType, name: str) -> CellType:
    """Return the cell in which a running function keeps a variable that it shares with its inner functions."""
    code = frame.f_code
    word = ctypes.c_void_p
    inner = word.from_address(id(frame) + _FRAME).value
    if sys.version_info < (3, 14) and inner and word.from_address(inner + _CODE).value == id(code):
        slot = word.from_address(inner + _VARIABLES + 8 * variables(code).index(name)).value
        if slot and word.from_address(slot + 8).value == id(CellType):
            cell: CellType = ctypes.cast(slot, ctypes.py_object).value
            return cell
    raise CaptureError(
        f"The variable {name!r} is shared with a function outside of this block, and this interpreter does not show "
        "where it keeps it. Keep the value in a list or another object that both use."
    )
