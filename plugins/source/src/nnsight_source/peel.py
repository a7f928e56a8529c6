"""From what is called to the Python functions that do the work, and back with others in their place.

Decorators, bound methods, partials and callable objects are layers around a function. A layer is rebuilt around the
new function with everything else it has: a decorator is its own code with one cell exchanged, and a Python function
as well, which can be replaced in its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, partialmethod
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from nnsight_source.text import no_source

Change = Callable[[FunctionType], FunctionType]

#: Makes the same callable again, of functions that are changed: by how far they are from the innermost, which is 0.
Rebuild = Callable[[Mapping[int, Change]], Any]

_DEPTH = 20


def peel(target: Any, depth: int = _DEPTH) -> tuple[list[FunctionType], Rebuild]:
    """Return the functions of a callable, innermost first, and what makes the same callable of others.

    Raises:
        SourceError: no Python function is in it.
    """
    if isinstance(target, FunctionType):
        cell = _inner_cell(target) if depth else None
        if cell is None:
            return [target], lambda changes: _changed(target, changes.get(0))
        inner, rebuild = peel(cell.cell_contents, depth - 1)
        return [*inner, target], lambda changes: _changed(
            _exchange(target, cell, rebuild(changes)), changes.get(len(inner))
        )
    if isinstance(target, MethodType):
        inner, rebuild = peel(target.__func__, depth)
        return inner, lambda changes: MethodType(rebuild(changes), target.__self__)
    if isinstance(target, partial):
        inner, rebuild = peel(target.func, depth)
        return inner, lambda changes: partial(rebuild(changes), *target.args, **target.keywords)
    if isinstance(target, partialmethod):
        inner, rebuild = peel(target.func, depth)
        return inner, lambda changes: partialmethod(rebuild(changes), *target.args, **target.keywords)
    if isinstance(target, staticmethod | classmethod):
        inner, rebuild = peel(target.__func__, depth)
        return inner, lambda changes: type(target)(rebuild(changes))
    call = next((vars(kind)["__call__"] for kind in type(target).__mro__ if "__call__" in vars(kind)), None)
    if isinstance(target, type | nn.Module) or not isinstance(call, FunctionType):
        raise no_source(name_of(target), _why(target))
    inner, rebuild = peel(call, depth)
    return inner, lambda changes: MethodType(rebuild(changes), target)


def module_of(target: Any, depth: int = _DEPTH) -> nn.Module | None:
    """Return the module that a callable calls as a whole, as what `torch.compile` makes of a module does; or None."""
    if isinstance(target, MethodType):
        is_call = getattr(target.__func__, "__code__", None) is nn.Module._wrapped_call_impl.__code__
        return target.__self__ if is_call and isinstance(target.__self__, nn.Module) else None
    cell = _inner_cell(target) if depth and isinstance(target, FunctionType) else None
    return None if cell is None else module_of(cell.cell_contents, depth - 1)


def name_of(target: Any) -> str:
    """Return what messages call a callable."""
    if isinstance(target, BuiltinFunctionType):
        return target.__name__  # its qualified name may be that of a class inside torch
    return str(getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or type(target).__name__)


def _why(target: Any) -> str:
    if isinstance(target, type):
        return "it is a class, and calling it makes an object"
    if isinstance(target, BuiltinFunctionType) or type(target).__module__ == "builtins":
        return "it is not written in Python"
    return f"a {type(target).__name__} does not lead to a Python function"


def _changed(function: FunctionType, change: Change | None) -> FunctionType:
    return function if change is None else change(function)


def _inner_cell(wrapper: FunctionType) -> CellType | None:
    """Return the cell in which a decorated function is kept; None for a function that is no decorator's work."""
    cells = [cell for cell in wrapper.__closure__ or () if _contents(cell) is not None]
    if not cells:
        return None
    wrapped = wrapper.__dict__.get("__wrapped__")
    if wrapped is not None:
        return next((cell for cell in cells if _is(cell.cell_contents, wrapped)), None)
    # Without functools.wraps: it passes everything on to the one function it knows, which has the name looked for.
    code = wrapper.__code__
    if code.co_name == "forward" or code.co_flags & 0xC != 0xC:  # CO_VARARGS | CO_VARKEYWORDS
        return None
    named = [cell for cell in cells if getattr(cell.cell_contents, "__name__", None) == "forward"]
    return named[0] if len(named) == 1 and callable(named[0].cell_contents) else None


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _is(found: Any, wanted: Any) -> bool:
    return found is wanted or (isinstance(found, MethodType) and isinstance(wanted, MethodType) and found == wanted)


def _exchange(wrapper: FunctionType, cell: CellType, content: Any) -> FunctionType:
    """Return a decorator's function with another content in one cell; the others are shared."""
    new = CellType(content)
    closure = tuple(new if other is cell else other for other in wrapper.__closure__ or ())
    made = FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, closure)
    made.__kwdefaults__ = wrapper.__kwdefaults__
    made.__dict__.update(wrapper.__dict__)
    return made
