"""Functions and classes made of the source that `describing` has sent, in the process that runs the block.

Each is made when it is first needed; the globals of functions are filled in last, because they may be what is being
made. A class is made by running its text, so what that may reach is there before.
"""

from __future__ import annotations

import builtins
import collections
import copy
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

from nnsight.errors import PayloadError
from nnsight.payload import library
from nnsight.payload.classes import codes_in, compile_class, functions_of
from nnsight.payload.names import eager_names, global_names
from nnsight.payload.outside import Outside, changeable
from nnsight.payload.sources import FUTURES, Source, compile_function, remember_lines
from nnsight.payload.unpacking import Unpacker

_IS_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code defines


class _InProgressError(Exception):
    """What is needed is being made."""


class Definitions:
    """The functions, classes, cells and namespaces of a payload.

    Args:
        tables: what `Descriptions.finish` returned.
        unpacker: makes values of data.
        called: returns what a file of the sender is called here: another name, where there may be one of that name.

    Raises:
        PayloadError: the tables are malformed.
    """

    def __init__(self, tables: Any, unpacker: Unpacker, called: Callable[[str], str] = str) -> None:
        match tables:
            case [list(functions), list(classes), list(cells), list(namespaces)]:
                self._functions, self._classes, self._cells = functions, classes, cells
            case _:
                raise PayloadError("The tables of definitions in this payload are malformed.")
        self._unpacker = unpacker
        self._called = called
        self._modules: list[types.ModuleType] = []
        self._names: list[dict[str, Any]] = []
        for entry in namespaces:
            match entry:
                case [str(name), dict(names)] if _are_names(names):
                    module = types.ModuleType(name)
                    module.__builtins__ = builtins  # type: ignore[attr-defined]
                    self._modules.append(module)
                    self._names.append(dict(names))
                case _:
                    raise PayloadError("A namespace in this payload is malformed.")
        spaces = zip(self._modules, self._names, strict=True)
        self._known = [(vars(module), changeable(names)) for module, names in spaces]
        self._made: dict[tuple[str, int], Any] = {}
        self._made_cells: dict[int, types.CellType] = {}
        self._making: set[int] = set()

    def get(self, data: list[Any]) -> Any:
        """Return a function, a class or a module of the user's."""
        match data:
            case ["namespace", int(number)] if 0 <= number < len(self._modules):
                return self._modules[number]
            case ["function", int(number)] if 0 <= number < len(self._functions):
                make = self._make_function
            case ["class", int(number)] if 0 <= number < len(self._classes):
                make = self._make_class
            case _:
                raise PayloadError(f"This payload refers to {data}, which is not in it.")
        key = data[0], number
        if key not in self._made:
            try:
                make(number)
            except (PayloadError, _InProgressError):
                raise
            except Exception as error:
                raise PayloadError(f"A {data[0]} of this payload cannot be made here: {error!r}") from error
        return self._made[key]

    def made(self) -> dict[int, tuple[list[Any], Any]]:
        """Return the functions and classes made so far: by `id`, what the payload calls them, and what they are."""
        return {id(value): ([*key], value) for key, value in self._made.items()}

    def namespace(self, number: Any) -> dict[str, Any]:
        """Return the globals of one of the user's files."""
        if type(number) is not int or not 0 <= number < len(self._modules):
            raise PayloadError(f"This payload refers to the namespace {number!r}, which is not in it.")
        return vars(self._modules[number])

    def outside(self, values: dict[str, Any], live: dict[str, types.CellType], own: Any, namespace: Any) -> Outside:
        """Return what a block finds outside of itself.

        Args:
            values: the variables that nobody else shares.
            live: the variables that functions outside of it share.
            own: the names that it binds.
            namespace: the number of its globals.
        """
        numbers = {id(cell): number for number, cell in self._made_cells.items()}
        mine: set[Any] = {("cell", numbers[id(cell)]) for name, cell in live.items() if name in own}
        mine |= {("global", namespace, name) for name in own}
        cells = [self.cell(number) for number in range(len(self._cells))]
        return Outside(values, cells, mine, self._known)

    def cell(self, number: Any) -> types.CellType:
        """Return a variable that functions share; it gets its content by `fill`."""
        if type(number) is not int or not 0 <= number < len(self._cells) or type(self._cells[number]) is not list:
            raise PayloadError(f"This payload refers to the variable {number!r}, which is not in it.")
        if number not in self._made_cells:
            self._made_cells[number] = types.CellType()
        return self._made_cells[number]

    def fill(self) -> None:
        """Bind all names that are not bound yet, and fill all cells."""
        for number, names in enumerate(self._names):
            for name in list(names):
                self._bind(number, name)
        for number in list(range(len(self._cells))):
            self._fill_cell(number)

    def _bind(self, number: int, name: str) -> Any:
        """Bind a name of a namespace, if it is one; return what it is bound to."""
        namespace, names = vars(self._modules[number]), self._names[number]
        if name in names:
            value = self._unpacker.value(names[name])
            if name in names:
                del names[name]
                namespace[name] = value
        return namespace.get(name)

    def _fill_cell(self, number: int) -> Any:
        cell, data = self.cell(number), self._cells[number]
        if data:
            value = self._unpacker.value(data[0])
            if data:
                data.clear()
                cell.cell_contents = value
        try:
            return cell.cell_contents
        except ValueError:
            return None

    # -- functions ---------------------------------------------------------------------------------------------------

    def _make_function(self, number: int) -> None:
        match self._functions[number]:
            case {"name": str(name), "free": dict(free), **rest} if _are_names(free):
                pass
            case _:
                raise PayloadError(f"The function {number} of this payload is malformed.")
        match rest:
            case {"library": [str(module), str(qualname)]}:
                code, values = self._library_code(module, qualname), vars(self._unpacker.imported(module, ""))
            case {"source": source, "module": int(space), "qualname": str(qualname)}:
                values = self.namespace(space)
                code = self._compile(source, free, compile_function).replace(co_qualname=qualname)
            case _:
                raise PayloadError(f"The function {number} of this payload is malformed.")
        if set(code.co_freevars) != free.keys():
            raise PayloadError(f"The function `{name}` closes over other variables here: {sorted(code.co_freevars)}.")
        closure = tuple(self.cell(free[variable]) for variable in code.co_freevars)
        function = types.FunctionType(code, values, name, None, closure)
        self._made["function", number] = function
        given: list[Any] = rest.get("defaults", [None, None])  # type: ignore[assignment]
        function.__defaults__, function.__kwdefaults__ = self._unpacker.items(given)
        fields: dict[str, Any] = rest.get("fields", {})  # type: ignore[assignment]
        for field, data in fields.items():
            vars(function)[field] = self._unpacker.value(data)

    def _library_code(self, module: str, qualname: str) -> types.CodeType:
        self._unpacker.imported(module, "")
        code = library.find_code(module, qualname)
        if code is None:
            raise PayloadError(
                f"The block uses a function that `{module}` makes, {qualname}, and here there is none. Install the "
                f"version of {module.partition('.')[0]} that the sender has."
            )
        return code

    # -- classes -----------------------------------------------------------------------------------------------------

    def _make_class(self, number: int) -> None:
        if number in self._making:
            raise _InProgressError
        self._making.add(number)
        try:
            match self._classes[number]:
                case {"fields": list(fields), "defaults": defaults, "name": str(name), "of": str(module)}:
                    self._made["class", number] = self._named_tuple(
                        name, fields, module, self._unpacker.value(defaults)
                    )
                case {"source": source, "module": int(space), "qualname": str(qualname), "name": str(name),
                      "free": dict(free), "values": dict(values)} if _are_names(free):  # fmt: skip
                    namespace = self.namespace(space)
                    code = self._compile(source, free, partial(compile_class, qualname=qualname))
                    self._prepare(code, space, free)
                    closure = tuple(self.cell(free[variable]) for variable in code.co_freevars)
                    make = types.FunctionType(_qualified(code, name, qualname), namespace, name, None, closure)
                    made = self._run(make)
                    self._made["class", number] = made
                    for attribute, data in values.items():
                        setattr(made, attribute, self._unpacker.value(data))
                case _:
                    raise PayloadError(f"The class {number} of this payload is malformed.")
        finally:
            self._making.discard(number)

    def _named_tuple(self, name: str, fields: list[str], module: str, defaults: dict[str, Any]) -> Any:
        made: Any = collections.namedtuple(name, fields, defaults=list(defaults.values()), module=module)  # type: ignore[misc]
        return made

    def _prepare(self, code: types.CodeType, space: int, free: dict[str, Any]) -> None:
        """Let all be there that running some code may reach, as far as it can be made yet."""
        todo: list[Any] = [partial(self._try, space, name) for name in eager_names(code)]
        todo += [partial(self._fill_cell, number) for number in free.values()]
        cells = {id(cell): number for number, cell in self._made_cells.items()}
        spaces = {id(vars(module)): number for number, module in enumerate(self._modules)}
        seen: set[int] = set()
        while todo:
            try:
                value = todo.pop()()
            except _InProgressError:
                continue  # it will be bound at the end
            for function in _functions_behind(value):
                if id(function) in seen:
                    continue
                seen.add(id(function))
                known = (cells.get(id(cell)) for cell in function.__closure__ or ())
                todo += [partial(self._fill_cell, number) for number in known if number is not None]
                number = spaces.get(id(function.__globals__))
                if number is not None:
                    todo += [partial(self._try, number, name) for name in global_names(function.__code__)]

    def _try(self, number: int, name: str) -> Any:
        """Bind a name as `_bind`; a container of what is being made is empty for now, as it was there."""
        try:
            return self._bind(number, name)
        except _InProgressError:
            empty = self._unpacker.empty(self._names[number].get(name))
            if empty is not None:
                vars(self._modules[number])[name] = empty
            raise

    def _run(self, make: Callable[[], Any]) -> Any:
        """Make a class. What doing so puts into containers is there already: it was when they were sent."""
        bound = [value for module in self._modules for value in vars(module).values()]
        before = [(value, copy.copy(value)) for value in bound if type(value) in (list, dict, set)]
        # What makes a class (a dataclass, say) looks for the module that it is of.
        mine = {module.__name__: module for module in self._modules if module.__name__ not in sys.modules}
        sys.modules.update(mine)
        try:
            made = make()
        finally:
            for name in mine:
                sys.modules.pop(name, None)
        for container, content in before:
            container.clear()
            (container.extend if type(container) is list else container.update)(content)
        return made

    def _compile(self, source: Any, free: dict[str, Any], compile_it: Any) -> types.CodeType:
        """Compile the source of a definition at its place in its file."""
        match source:
            case [str(filename), int(line), int(column), str(text), str(owner), list(futures), bool(is_lambda)]:
                pass
            case _:
                raise PayloadError("A source in this payload is malformed.")
        is_placed = 0 < line < 1 << 24 and 0 <= column < 1 << 16 and "\0" not in filename
        if not is_placed or not all(type(name) is str and name in FUTURES for name in futures):
            raise PayloadError("A source in this payload is at no place that it can be at.")
        filename = self._called(filename)
        found = Source(filename, line, column, text, owner, tuple(futures), is_lambda)
        try:
            code: types.CodeType = compile_it(found, list(free))
        except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError, StopIteration) as error:
            raise PayloadError(f"A source in this payload cannot be compiled: {error}.") from None
        remember_lines(filename, line, " " * column + text)
        return code


def _functions_behind(value: Any) -> list[types.FunctionType]:
    """Return the functions that using a value may call."""
    value = getattr(value, "__func__", value)
    if isinstance(value, types.FunctionType):
        return [value]
    kinds = value.__mro__ if isinstance(value, type) else type(value).__mro__
    return [function for kind in kinds if kind.__flags__ & _IS_HEAP for function in functions_of(kind)]


def _qualified(code: types.CodeType, name: str, qualname: str) -> types.CodeType:
    """Return code that makes a class with the qualified names that the class and its methods had."""
    body = next(c for c in codes_in(code) if c.co_name == name)
    return code if body.co_qualname == qualname else _renamed(code, body.co_qualname, qualname)


def _renamed(code: types.CodeType, old: str, new: str) -> types.CodeType:
    constants = tuple(
        _renamed(c, old, new) if isinstance(c, types.CodeType) else new + c[len(old) :] if _is_below(c, old) else c
        for c in code.co_consts
    )
    own = code.co_qualname
    return code.replace(co_consts=constants, co_qualname=new + own[len(old) :] if _is_below(own, old) else own)


def _is_below(name: object, old: str) -> bool:
    return isinstance(name, str) and (name == old or name.startswith(f"{old}."))


def _are_names(names: dict[Any, Any]) -> bool:
    return all(type(name) is str and name.isidentifier() for name in names)
