"""What the user's files define, as source: functions and classes with what they close over and the globals they use.

A namespace stands for the globals of one file: functions of that file share it at the other end, too, as they share the
variables that they close over. Only names that something uses are in it. `defining` is the way back.
"""

from __future__ import annotations

import builtins
import functools
import types
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from nnsight.capture.cells import Scope
from nnsight.payload import library
from nnsight.payload.classes import ClassSource, class_source, named_fields
from nnsight.payload.names import attributes_of, eager_names, global_names
from nnsight.payload.outside import Outside, changeable
from nnsight.payload.packing import Packer, RefusedError
from nnsight.payload.sources import NoSourceError, function_source, parse_source

#: Returns the dotted attributes that code takes from a name; None where it is used otherwise.
Attributes = Callable[[], frozenset[str] | None]
Uses = Callable[[str], frozenset[str] | None]

_MODULE = (
    "it is the module `{name}` of your files, used otherwise than as `{name}.something`. Import what the block uses of "
    "it by name."
)
_LOST = (
    "it uses `{name}` while it is defined, a variable of a function around it that is not to be had. Define it at the "
    "top of its file."
)


class Descriptions:
    """The functions, classes, cells and namespaces of a payload.

    Args:
        packer: makes data of the values that they use.
    """

    def __init__(self, packer: Packer) -> None:
        self._packer = packer
        self.functions: list[Any] = []
        self.classes: list[Any] = []
        self.cells: list[list[Any]] = []
        self.namespaces: list[Any] = []
        self._cell_numbers: dict[int, tuple[types.CellType, int]] = {}
        self._namespace_numbers: dict[int, tuple[dict[str, Any], int]] = {}
        #: What is still to be packed: what to call it, what packs it, and where the data goes.
        self._todo: deque[tuple[str, Callable[[], Any], Callable[[Any], Any]]] = deque()

    def fill(self, data: list[Any], value: Any) -> bool:
        """Put the data of a function or class into the list that stands for it; return whether it is one.

        Raises:
            RefusedError: its source is not to be had.
        """
        if isinstance(value, types.FunctionType):
            data += ["function", len(self.functions)]
            self.functions.append(None)
            self.functions[data[1]] = self._function(value)
        elif isinstance(value, type):
            data += ["class", len(self.classes)]
            self.classes.append(None)
            self.classes[data[1]] = self._class(value)
        elif isinstance(value, functools._lru_cache_wrapper):
            options = value.cache_parameters()
            data += ["cached", self._packer.pack(value.__wrapped__), options["maxsize"], options["typed"]]
        elif isinstance(value, types.ModuleType):
            raise RefusedError(_MODULE.format(name=value.__name__))
        else:
            return False
        return True

    def packed(self) -> dict[tuple[str, int], Any]:
        """Return the functions and classes that were met, by what the payload calls them."""
        every = self._packer.met()
        return {(data[0], data[1]): value for value, data in every if data[:1] in (["function"], ["class"])}

    def finish(self) -> list[Any]:
        """Pack all that is still to be packed; return the tables as JSON has them.

        Raises:
            UnsendableError: something in them cannot travel.
        """
        while self._todo:
            what, pack, put = self._todo.popleft()
            put(self._packer.guarded(what, pack))
        return [self.functions, self.classes, self.cells, self.namespaces]

    def outside(self, scope: Scope) -> Outside:
        """Return what a block that was packed finds outside of itself."""
        values, live, namespace = scope.outside()
        cells = [cell for cell, _ in self._cell_numbers.values()]
        namespaces = [
            (values, changeable(self.namespaces[number][1])) for values, number in self._namespace_numbers.values()
        ]
        block = scope.block
        own: set[Any] = {("cell", self._cell_numbers[id(live[name])][1]) for name in live.keys() & block.bound}
        number = self.namespace(namespace)
        own |= {("global", number, name) for name in block.bound | block.declared_global}
        return Outside(values, cells, own, namespaces)

    # -- what code refers to -----------------------------------------------------------------------------------------

    def namespace(self, values: dict[str, Any]) -> int:
        """Return the number of the namespace that stands for some globals."""
        known = self._namespace_numbers.get(id(values))
        if known is None:
            known = self._namespace_numbers[id(values)] = values, len(self.namespaces)
            self.namespaces.append([str(values.get("__name__", "__main__")), {}])
        return known[1]

    def use(self, values: dict[str, Any], names: Iterable[str], what: str, uses: Uses) -> int:
        """Let some globals be there at the other end; return the number of their namespace.

        Args:
            values: the globals.
            names: those that are used; what is not there is passed over.
            what: what messages call them, with a place for the name.
            uses: returns the dotted attributes that are taken from a name.
        """
        number = self.namespace(values)
        for name in sorted(names):
            if name in values and name != "__builtins__":
                self._put(number, name, values[name], what.format(name=name), partial(uses, name))
        return number

    def cell(self, cell: types.CellType, what: str, attributes: Attributes) -> int:
        """Return the number of a cell, a variable that functions share."""
        known = self._cell_numbers.get(id(cell))
        if known is None:
            known = self._cell_numbers[id(cell)] = cell, len(self.cells)
            held: list[Any] = []
            self.cells.append(held)
            try:
                content = cell.cell_contents
            except ValueError:
                return known[1]  # not bound yet
            self._todo.append((what, partial(self.value, content, attributes), held.append))
        return known[1]

    def value(self, value: Any, attributes: Attributes) -> Any:
        """Return as data what a name is bound to.

        Raises:
            RefusedError: it cannot be.
        """
        if not _is_own_module(value):
            return self._packer.pack(value)
        used = attributes()
        if used is None:
            raise RefusedError(_MODULE.format(name=value.__name__))
        number = self.namespace(vars(value))
        for chain in sorted(used):
            name, _, rest = chain.partition(".")
            if name in vars(value):
                what = f"{self._packer.what.rstrip(',')}: `{value.__name__}.{name}`"
                self._put(number, name, vars(value)[name], what, partial(_rest, rest))
        return ["namespace", number]

    def _put(self, number: int, name: str, value: Any, what: str, attributes: Attributes) -> None:
        """Let a namespace have a name."""
        table = self.namespaces[number][1]
        if name not in table or _is_own_module(value):
            table.setdefault(name)
            self._todo.append((what, partial(self.value, value, attributes), partial(table.__setitem__, name)))

    # -- definitions -------------------------------------------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> dict[str, Any]:
        packer, code = self._packer, function.__code__
        called = f"{packer.what.rstrip(',')}: `{{name}}`, which `{function.__name__}` uses,"
        free = list(zip(code.co_freevars, function.__closure__ or (), strict=True))
        where = library.code_reference(function)
        if where is not None:
            found: dict[str, Any] = {"library": where}
            uses: Uses = _everything
        else:
            try:
                source = function_source(function)
            except NoSourceError as error:
                raise RefusedError(f"it is the function `{function.__qualname__}`, {error}.") from None
            uses = lambda name: attributes_of(name, [parse_source(source)])  # noqa: E731
            number = self.use(function.__globals__, global_names(code), called, uses)
            found = {"source": source.data(), "module": number, "qualname": function.__qualname__}
        found |= {
            "name": function.__name__,
            "free": {name: self.cell(cell, called.format(name=name), partial(uses, name)) for name, cell in free},
        }
        if function.__defaults__ or function.__kwdefaults__:
            found["defaults"] = [packer.pack(function.__defaults__), packer.pack(function.__kwdefaults__)]
        if vars(function):
            found["fields"] = {name: packer.pack(value) for name, value in vars(function).items()}
        return found

    def _class(self, kind: type) -> dict[str, Any]:
        packer = self._packer
        named = named_fields(kind)
        if named is not None:
            fields, defaults = named
            return {"fields": fields, "defaults": packer.pack(defaults), "name": kind.__name__, "of": kind.__module__}
        try:
            source = class_source(kind)
        except NoSourceError as error:
            raise RefusedError(f"it is the class `{kind.__qualname__}`, {error}.") from None
        called = f"{packer.what.rstrip(',')}: `{{name}}`, which `{kind.__name__}` uses,"
        uses: Uses = lambda name: attributes_of(name, [source.node])  # noqa: E731
        free = {name: self.cell(cell, called.format(name=name), partial(uses, name)) for name, cell in source.cells()}
        for name in sorted(eager_names(source.code()) - source.namespace.keys() - _BUILTINS):
            base = source.base(name)
            if base is None:
                raise RefusedError(f"it is the class `{kind.__qualname__}`: " + _LOST.format(name=name))
            free[name] = self.cell(types.CellType(base), called.format(name=name), partial(uses, name))
        number = self.use(source.namespace, global_names(source.code()), called, uses)
        return {
            "source": source.source.data(), "module": number, "qualname": kind.__qualname__, "name": kind.__name__,
            "free": free, "values": self._class_values(source),
        }  # fmt: skip

    def _class_values(self, source: ClassSource) -> dict[str, Any]:
        """Return the attributes of a class that its text does not give it as they are now."""
        found = {}
        for name, value, is_needed in source.values():
            try:
                found[name] = self._packer.pack(value)
            except RefusedError as error:
                if is_needed:
                    error.steps.append(f"the attribute {name!r} of the class `{source.kind.__qualname__}`")
                    raise
        return found


_BUILTINS = frozenset(dir(builtins))


def _rest(chain: str) -> frozenset[str] | None:
    return frozenset({chain}) if chain else None


def _everything(name: str) -> None:
    return None


def _is_own_module(value: object) -> bool:
    return isinstance(value, types.ModuleType) and not library.is_installed(value)
