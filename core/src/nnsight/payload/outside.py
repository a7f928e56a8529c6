"""What a block finds outside of itself, at both ends: so that what it does to that there can be done here, too."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from types import CellType
from typing import Any

#: What both ends call a variable: `("value", name)`, `("cell", number)` or `("global", number, name)`.
Key = tuple[Any, ...]


def changeable(names: Iterable[str]) -> list[str]:
    """Return the names of a file that a block may bind there: all but those that Python gives a meaning."""
    return [name for name in names if not (name.startswith("__") and name.endswith("__"))]


class Outside:
    """The variables around a block.

    Args:
        values: those of the function around it that nobody else shares.
        cells: those that functions share.
        own: the variables that the block binds itself.
        namespaces: the globals of the files that something in the payload is from, and the names in them that travel.
    """

    def __init__(
        self, values: dict[str, Any], cells: Sequence[CellType], own: set[Key],
        namespaces: Sequence[tuple[dict[str, Any], Collection[str]]],
    ) -> None:  # fmt: skip
        self._values = values
        self._cells = cells
        self._namespaces = namespaces
        self._own = own

    def variables(self) -> Iterator[tuple[Key, Any]]:
        """Yield every variable that is bound: what it is called, and its value."""
        for name, value in self._values.items():
            yield ("value", name), value
        for number, cell in enumerate(self._cells):
            try:
                yield ("cell", number), cell.cell_contents
            except ValueError:
                continue  # not bound
        for number, (namespace, names) in enumerate(self._namespaces):
            for name in names:
                if name in namespace:
                    yield ("global", number, name), namespace[name]

    def is_shared(self, key: Key) -> bool:
        """Return whether others than the block may bind a variable: it is not one of the block's own."""
        return key[0] != "value" and key not in self._own

    def get(self, key: Any) -> Any:
        """Return the value of a variable.

        Raises:
            LookupError: there is no such variable.
        """
        match key:
            case ["value", str(name)]:
                return self._values[name]
            case ["cell", int(number)] if number >= 0:
                try:
                    return self._cells[number].cell_contents
                except ValueError:
                    raise LookupError(f"the variable {number} is not bound") from None
            case ["global", int(number), str(name)] if number >= 0 and name in self._namespaces[number][1]:
                return self._namespaces[number][0][name]
        raise LookupError(f"no variable is called {key!r}")

    def bind(self, key: Any, value: Any) -> None:
        """Bind a variable that others share.

        Raises:
            LookupError: there is no such variable.
        """
        match key:
            case ["cell", int(number)] if number >= 0 and self.is_shared(tuple(key)):
                self._cells[number].cell_contents = value
            case ["global", int(number), str(name)] if number >= 0 and self.is_shared(tuple(key)):
                self.get(key)  # names that were not there are not made
                self._namespaces[number][0][name] = value
            case _:
                raise LookupError(f"no variable is called {key!r}")
