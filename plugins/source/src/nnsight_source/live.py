"""A rewritten function while a run is open: what its operations pass through.

Everything here belongs to one run and goes with it. A run that looks into a module has that module's rewritten forward
in place of the original; every operation is counted, and served where a block waits for it, as modules are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

from nnsight import Interleaver, current_run
from nnsight_source.errors import SourceError
from nnsight_source.peel import Change, peel
from nnsight_source.place import Anchor, stand_in
from nnsight_source.rewrite import OPERATORS, known_rewritten
from nnsight_source.spots import Rewritten
from nnsight_source.syntax import CALL, VALUE

_REPLACED = (
    "This `.source` is of `{name}` as it was when the source was taken, and the module has another forward by now. "
    "Take the source again."
)
_operator_cells = {name: CellType(function) for name, function in OPERATORS.items()}


class Live:
    """One rewritten function in one run.

    Args:
        run: the run.
        rewritten: the function.
        first: the number of its first location.
        layer: how far it is from the innermost function of what is called: 0, or of a decorator.
        passes: how often what contains it has been called in this run already, without being looked into.
        is_entered: whether the last of these calls is still going on.

    Attributes:
        inner: the functions that are looked into when an operation calls them, by the number of its input.
        known: the functions that an operation was last found to call, and what they are bound to.
        called: what the operation calls at whose input the model stands.
    """

    __slots__ = ("_cells", "called", "first", "inner", "is_entered", "known", "layer", "passes", "rewritten")

    def __init__(
        self, run: Interleaver, rewritten: Rewritten, first: int, layer: int, passes: int = 0, is_entered: bool = False
    ) -> None:
        self.rewritten = rewritten
        self.first = first
        self.layer = layer
        self.passes = passes
        self.is_entered = is_entered
        self.inner: dict[int, list[Live]] = {}
        self.known: dict[int, tuple[list[FunctionType], Any]] = {}
        self.called: dict[int, Any] = {}
        run.count(first + rewritten.size - 1)  # from here on all of them are counted
        if passes:
            # Of one under a branch this is a guess: `Site.enter` refuses what would depend on it.
            for spot in rewritten.unrepeated:
                run.counts[first + spot.output] = passes
                if spot.input >= 0:
                    run.counts[first + spot.input] = passes
        call, value = _make_visits(run, first, self.inner, self.called)
        self._cells = {CALL: CellType(call), VALUE: CellType(value), **_operator_cells}

    def is_in(self, functions: list[FunctionType]) -> bool:
        """Whether the functions of a callable are such that this is one of them."""
        return self.layer < len(functions) and known_rewritten(functions[self.layer].__code__) is self.rewritten

    def around(self, function: FunctionType) -> FunctionType:
        """Return a function rewritten, with the closure, the globals and the default values that it has."""
        code = self.rewritten.code
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        closure = tuple(self._cells.get(name) or cells[name] for name in code.co_freevars)
        new = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
        new.__kwdefaults__ = function.__kwdefaults__
        return new


def _make_visits(
    run: Interleaver, first: int, inner: dict[int, list[Live]], called: dict[int, Any]
) -> tuple[Callable[..., Any], Callable[[int, Any], Any]]:
    """Return what the calls and the values of a rewritten function pass through."""
    get_run, get_ident, counts = current_run.get, threading.get_ident, run.counts

    def call(index: int, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if get_run() is not run or run.thread != get_ident() or run.tree is None:
            return function(*args, **kwargs)
        number = first + index
        counts[number] += 1
        if number in run.waiting:
            called[index] = function
            try:
                args, kwargs = run.serve(number, (args, kwargs))
            finally:
                del called[index]
            if run.skipped is not None:
                result = run.take_skipped(number)
            else:
                result = (_look_into(inner[index], function) if index in inner else function)(*args, **kwargs)
        elif index in inner:
            result = _look_into(inner[index], function)(*args, **kwargs)
        else:
            result = function(*args, **kwargs)
        number += 1
        counts[number] += 1
        return run.serve(number, result) if number in run.waiting else result

    def value(index: int, result: Any, /) -> Any:
        if get_run() is not run or run.thread != get_ident() or run.tree is None:
            return result
        number = first + index
        counts[number] += 1
        return run.serve(number, result) if number in run.waiting else result

    return call, value


_VISITS = frozenset(code for code in _make_visits.__code__.co_consts if isinstance(code, CodeType))


def _without_visits(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward whose errors do not show what its operations pass through: the last line is the model's."""

    def shown(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except BaseException as error:
            entry = error.__traceback__
            while entry is not None:
                while entry.tb_next is not None and entry.tb_next.tb_frame.f_code in _VISITS:
                    entry.tb_next = entry.tb_next.tb_next
                entry = entry.tb_next
            raise

    return shown


def _look_into(lives: list[Live], function: Any) -> Any:
    """Return a callable with its functions rewritten that are looked into."""
    if isinstance(function, nn.Module):
        return function
    try:
        functions, rebuild = peel(function)
    except SourceError:
        return function
    changes = {live.layer: live.around for live in lives if live.is_in(functions)}
    return rebuild(changes) if changes else function


class _Table:
    """What one run looks into. It takes everything away when it is called, and can put it in place again."""

    __slots__ = ("_calls", "_changes", "_leaving", "_modules", "forwards", "lives", "run")

    def __init__(self, run: Interleaver) -> None:
        self.run = run
        self.lives: dict[int, Live] = {}
        self.forwards: dict[int, Callable[..., Any]] = {}
        self._modules: list[tuple[nn.Module, int, int]] = []
        self._changes: dict[int, dict[int, Change]] = {}
        self._calls: list[tuple[int, int, int]] = []
        self._leaving: list[Callable[[], None]] = []
        _tables[run] = self
        run.closing = [*run.closing, self]

    def add_module(self, module: nn.Module, around: int, live: Live) -> bool:
        """Put the rewritten forward of a module in place; False when the module has another forward by now."""
        anchor = Anchor(module)
        functions, rebuild = peel(anchor.value)
        if not live.is_in(functions):
            return False
        self.lives[live.first] = live
        self._modules.append((module, around, live.first))
        changes = self._changes.setdefault(id(module), {})
        changes[live.layer] = live.around
        self.forwards[id(module)] = _without_visits(anchor.bind(rebuild(changes)))
        self._leaving.append(stand_in(anchor, _forward_in_run))
        return True

    def add_call(self, outer: Live, index: int, live: Live) -> None:
        """Put a rewritten function in place, wherever one operation calls the function."""
        self.lives[live.first] = live
        self._calls.append((outer.first, index, live.first))
        outer.inner.setdefault(index, []).append(live)

    def __call__(self) -> None:
        del _tables[self.run]
        for leave in self._leaving:
            leave()

    def again(self, run: Any) -> None:
        """Put the same in place for what stands in for the run."""
        table = _Table(run)
        for module, around, first in self._modules:
            table.add_module(module, around, table.copy(self.lives[first], around))
        for outer, index, first in self._calls:
            if outer in table.lives:
                table.add_call(table.lives[outer], index, table.copy(self.lives[first], outer + index))

    def copy(self, live: Live, around: int) -> Live:
        """Return a function of another table for this one's run, counted as it was then."""
        run, rewritten, first = self.run, live.rewritten, live.first
        run.count(first + rewritten.size - 1)
        is_counted = any(run.counts[first : first + rewritten.size])
        return Live(run, rewritten, first, live.layer, 0 if is_counted else run.count(around))


_tables: dict[Any, _Table] = {}


def find_live(run: Interleaver, first: int) -> Live | None:
    """Return the function whose locations start at a number, if the run looks into it already."""
    table = _tables.get(run)
    return None if table is None else table.lives.get(first)


def look_into_module(
    run: Interleaver, first: int, around: int, module: nn.Module, rewritten: Rewritten, layer: int
) -> Live:
    """Put the rewritten forward of a module in place for a run.

    Args:
        run: the run.
        first: the number of its first location.
        around: the number of the module's input.
        module: the module.
        rewritten: its forward, or what wraps that, `layer` times.

    Raises:
        SourceError: the module has another forward by now.
    """
    live = _begin(run, rewritten, first, around, layer)
    if not (_tables.get(run) or _Table(run)).add_module(module, around, live):
        raise SourceError(_REPLACED.format(name=rewritten.name))
    return live


def look_into_call(run: Interleaver, first: int, outer: Live, index: int, rewritten: Rewritten, layer: int) -> Live:
    """Put a rewritten function in place for a run, wherever one operation calls the function.

    Args:
        run: the run.
        first: the number of its first location.
        outer: the function with the operation.
        index: the number of the operation's input, in that function.
        rewritten: the function that it calls, or what wraps that, `layer` times.
    """
    live = _begin(run, rewritten, first, outer.first + index, layer)
    _tables[run].add_call(outer, index, live)
    return live


def _begin(run: Interleaver, rewritten: Rewritten, first: int, around: int, layer: int) -> Live:
    passes = run.count(around) - (run.at == around)
    return Live(run, rewritten, first, layer, passes, passes > run.count(around + 1))


def _forward_in_run(module: nn.Module) -> Callable[..., Any] | None:
    run = current_run.get()
    table = None if run is None else _tables.get(run)
    return None if table is None else table.forwards.get(id(module))
