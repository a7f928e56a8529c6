"""What a cache holds, and how it is reached: `cache["model.h.0"].output`, `cache.model.h[0].output`, `cache.step(2)`.

One type whether a module was visited once or often: `cache[path]` is an `Entry`, its `.steps` are the visits. `.output`
of an entry is short for that of its only visit, and an error where there are several.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from os import PathLike
from typing import Any

from nnsight._frames import at_users_line
from nnsight._words import describe, nearest
from nnsight.builtin.paths import Table, table_of
from nnsight.builtin.sizes import readable, size_of
from nnsight.builtin.visit import Visit
from nnsight.errors import CacheError, NotCachedError
from nnsight.kernel.envoy import Envoy
from nnsight.kernel.location import ROOT, Tree

Record = tuple[int, int, Any]  # number of the location, occurrence, value


class Entry:
    """One module of a cache: its visits, and the modules below it by attribute and index."""

    __slots__ = ("_cache", "_path", "_second")

    def __init__(self, cache: Cache, path: str, second: str | None = None) -> None:
        self._cache = cache
        self._path = path
        self._second = second  # `cache.model` is the root, and perhaps a module called `model` below it

    @property
    def path(self) -> str:
        """Where the module is, from the root `model`."""
        return self._path

    @property
    def steps(self) -> tuple[Visit, ...]:
        """The visits, in order: one, or several where the model called the module again.

        Raises:
            CacheError: there is none.
        """
        index = self._cache._index()
        visits = index.get(self._path) or index.get(self._second or "")
        if not visits:
            # No AttributeError: Python would ask __getattr__ for a module called `steps`.
            raise CacheError(str(self._cache._missing(self._path)))
        return tuple(visits.values())

    @property
    @at_users_line
    def output(self) -> Any:
        """What the module's caller got, at its only visit."""
        return self._only("output").output

    @property
    @at_users_line
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the module's caller passed at its only visit: `(args, kwargs)`."""
        return self._only("inputs").inputs

    @property
    @at_users_line
    def input(self) -> Any:
        """The first argument passed, at the only visit."""
        return self._only("input").input

    def _only(self, port: str) -> Visit:
        steps = self.steps
        if len(steps) > 1:
            raise CacheError(
                f"`{self._path}` was visited {len(steps)} times, so it has no single `.{port}`. Take "
                f"`.steps[i].{port}` for visit i, `[step.{port} for step in ....steps]` for all, or "
                f"`cache.step({steps[0].occurrence})` for a cache of one step."
            )
        return steps[0]

    @at_users_line
    def __getattr__(self, name: str) -> Entry:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._child(name)

    @at_users_line
    def __getitem__(self, key: int | str) -> Entry:
        if isinstance(key, int) and key < 0:
            names = self._cache._children(self._path) or self._cache._children(self._second or "")
            if -key > len(names):
                raise IndexError(f"`{self._path}` has {len(names)} modules in the cache, so there is no {key}.")
            return self._child(names[key])
        return self._child(str(key))

    def _child(self, name: str) -> Entry:
        for path in filter(None, (self._path, self._second)):
            found = self._cache._walk(path, name.split("."))
            if found is not None:
                return Entry(self._cache, found)
        raise self._cache._missing(f"{self._path}.{name}")

    def __iter__(self) -> Iterator[Entry]:
        return (Entry(self._cache, f"{self._path}.{name}") for name in self._cache._children(self._path))

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._cache._children(self._path)})

    def __repr__(self) -> str:
        visits = self._cache._index().get(self._path, {})
        if not visits:
            return f"Entry({self._path}: {len(self._cache._children(self._path))} modules below)"
        first = next(iter(visits.values()))
        return f"Entry({self._path}: {len(visits)} visit{'s' * (len(visits) > 1)}, {first!r})"


class Cache:
    """What `tracer.cache(...)` keeps, by module.

    Keys are the paths of the modules that the run visited, in the order in which it first reached them.
    """

    def __init__(self, root: Envoy | None, include_output: bool = True, include_inputs: bool = False) -> None:
        """Make an empty cache.

        Args:
            root: the root of the model; it is not kept alive.
            include_output: whether it will hold outputs; `include_inputs` whether inputs.
        """
        self._tree = Tree() if root is None else root._tree
        self._root = None if root is None else weakref.ref(root)
        self._given_table: Table | None = None if root is None or root._naming is None else table_of(root)
        self._ports = include_output, include_inputs
        self._records: list[Record] = []
        self._indexed = 0
        self._visits: dict[str, dict[int, Visit]] = {}
        self._below: dict[str, list[str]] = {}

    # -- by path -----------------------------------------------------------------------------------------------------

    @at_users_line
    def __getitem__(self, path: Any) -> Entry:
        """Return the entry of a module: by path, from the root or below it, any of its names, or by what has one."""
        found = self._find(path)
        if found is None:
            raise self._missing(_plain(path))
        return Entry(self, found)

    def __contains__(self, path: object) -> bool:
        return (isinstance(path, str) or hasattr(path, "path")) and self._find(path) in self._index()

    @at_users_line
    def __getattr__(self, name: str) -> Entry:
        if name.startswith("_"):
            raise AttributeError(f"'Cache' object has no attribute {name!r}")
        below = self._walk(ROOT, [name])
        if name == ROOT:
            return Entry(self, ROOT, below)
        if below is None:
            raise self._missing(name)
        return Entry(self, below)

    def __len__(self) -> int:
        return len(self._index())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self, alias: bool = False) -> list[str]:
        """Return the paths of the modules visited.

        Args:
            alias: under their other names, where they have such.
        """
        paths = list(self._index())
        return [self._renamed(path) for path in paths] if alias else paths

    def values(self) -> list[Entry]:
        """Return the entries of the modules visited."""
        return [Entry(self, path) for path in self._index()]

    def items(self, alias: bool = False) -> list[tuple[str, Entry]]:
        """Return paths and entries of the modules visited."""
        return list(zip(self.keys(alias), self.values(), strict=True))

    @at_users_line
    def step(self, occurrence: int) -> Cache:
        """Return a cache of the visits with one number, counted from 0: in a generation those of that step.

        Raises:
            NotCachedError: no module was visited so often.
        """
        one = Cache(None, *self._ports)
        one._tree, one._root, one._given_table = self._tree, self._root, self._given_table
        one._records = [record for record in self._records if record[1] == occurrence]
        if not one._records:
            last = max((record[1] for record in self._records), default=-1)
            raise NotCachedError(f"The cache holds no step {occurrence}: its last is {last}.")
        return one

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """Return path -> one dict per visit, with `output` and `inputs` as far as they were kept."""
        return {path: [visit._as_dict() for visit in visits.values()] for path, visits in self._index().items()}

    @at_users_line
    def save(self, file: str | PathLike[str] | None = None) -> Cache:
        """Write the cache to a file (safetensors), or, without one, mark it as what must come back from the block.

        Args:
            file: where to write; an existing file is replaced once the new one is complete.

        Returns:
            This cache.

        Raises:
            CacheFileError: it cannot be written.
        """
        if file is None:
            from nnsight.tracing.saving import save

            return save(self)
        from nnsight.builtin.cachefile import write  # lazy: most caches stay in memory

        write(self, file)
        return self

    @classmethod
    @at_users_line
    def load(cls, file: str | PathLike[str]) -> Cache:
        """Read a cache that was saved to a file.

        Raises:
            CacheFileError: it cannot be read, or is no such file.
        """
        from nnsight.builtin.cachefile import read  # lazy: most caches stay in memory

        return read(file)

    def __nnsight_pack__(self) -> list[Any]:
        """Return what it is made of, for a payload."""
        names = [[parent, name, target] for (parent, name), target in self._table().items()]
        return [list(self._ports), names, [[*self._tree[number], *rest] for number, *rest in self._records]]

    @classmethod
    def __nnsight_unpack__(cls, root: Any, content: Any) -> Cache:
        """Return what `__nnsight_pack__` has told of; anybody may have written that."""
        (has_output, has_inputs), names, records = content
        new = cls(None, bool(has_output), bool(has_inputs))
        new._given_table = {(str(parent), str(name)): str(target) for parent, name, target in names}
        for path, port, occurrence, value in records:
            if not (type(path) is str and port in ("input", "output") and type(occurrence) is int and occurrence >= 0):
                raise ValueError(f"it lists {path!r}, {port!r}, {occurrence!r} as a visit")
            new._records.append((new._tree.number(path, port), occurrence, value))
        return new

    # -- how much ----------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """How many bytes the tensors take."""
        return sum(size_of(value) for _, _, value in self._records)

    def tree(self) -> str:
        """Return the modules as an indented tree, with shapes and sizes."""
        lines: list[str] = []

        def add(path: str, name: str, depth: int) -> None:
            visits = list(self._index().get(path, {}).values())
            shown = ""
            if visits:
                size = sum(size_of(value) for visit in visits for value in visit._values.values())
                what = ", ".join(f"{key} {describe(value)}" for key, value in visits[0]._as_dict().items())
                shown = f": {what}{f' x {len(visits)}' * (len(visits) > 1)}, {readable(size)}"
            lines.append(f"{'  ' * depth}{name}{shown}")
            for child in self._children(path):
                add(f"{path}.{child}", child, depth + 1)

        add(ROOT, ROOT, 0)
        return "\n".join(lines)

    def __repr__(self) -> str:
        index = self._index()
        visits = sum(map(len, index.values()))
        head = f"Cache of {len(index)} modules, {visits} visits, {readable(self.nbytes)}"
        rows = [
            f"  {path}: {next(iter(found.values()))!r}{f' and {len(found) - 1} more' * (len(found) > 1)}"
            for path, found in list(index.items())[:12]
        ]
        rest = [f"  ... {len(index) - 12} more; `.tree()` shows all"] if len(index) > 12 else []
        return "\n".join([head, *rows, *rest])

    # -- names -------------------------------------------------------------------------------------------------------

    def _index(self) -> dict[str, dict[int, Visit]]:
        """Return path -> occurrence -> visit, brought up to date: the run may still go on."""
        records, visits = self._records, self._visits
        while self._indexed < len(records):
            number, occurrence, value = records[self._indexed]
            self._indexed += 1
            path, port = _plain(self._tree[number]), self._tree[number].port
            if path not in visits:
                visits[path] = {}
                self._add_path(path)
            visit = visits[path].get(occurrence)
            if visit is None:
                visit = visits[path][occurrence] = Visit(path, occurrence)
            visit._values[port] = value
        return visits

    def _add_path(self, path: str) -> None:
        while path != ROOT:
            path, _, name = path.rpartition(".")
            below = self._below.setdefault(path, [])
            if name in below:
                return
            below.append(name)
            if name.isdigit() and below[-2:-1] != [str(int(name) - 1)]:
                below.sort(key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))

    def _children(self, path: str) -> list[str]:
        self._index()
        return self._below.get(path, [])

    def _table(self) -> Table:
        """Return where other names lead."""
        if self._given_table is None:
            root = self._root() if self._root is not None else None
            self._given_table = {} if root is None else table_of(root)
        return self._given_table

    def _walk(self, path: str, names: list[str]) -> str | None:
        """Return the path that names lead to from another, None where the cache holds nothing below it."""
        for name in names:
            if name in self._children(path):
                path = f"{path}.{name}"
            else:
                target = self._table().get((path, name))
                if target is None or not (target in self._index() or self._children(target)):
                    return None
                path = target
        return path

    def _find(self, path: object) -> str | None:
        full = _plain(path)
        is_there = full in self._index() or bool(self._children(full))
        if is_there or not isinstance(path, str):
            return full if is_there else None
        names = full.split(".")
        found = self._walk(ROOT, names)
        return found if found is not None or names[0] != ROOT else self._walk(ROOT, names[1:])

    def _renamed(self, path: str) -> str:
        names = {(parent, target): name for (parent, name), target in reversed(self._table().items())}
        parts, at = [ROOT], ROOT
        for name in path.split(".")[1:]:
            target = f"{at}.{name}"
            parts.append(names.get((at, target), name))
            at = target
        return ".".join(parts)

    def _missing(self, path: str) -> NotCachedError:
        index = self._index()
        if not index:
            return NotCachedError(
                f"`{path}` was not cached: the cache is empty. It fills while the run goes on: read it after the "
                "`with`, and place `tracer.cache()` before the values it is to hold."
            )
        full = path if path == ROOT or path.startswith(f"{ROOT}.") else f"{ROOT}.{path}"
        near = nearest(full, [*index, *self.keys(alias=True)])
        return NotCachedError(
            f"`{path}` was not cached: it is no module that the cache was to hold, or the run did not call it.{near}"
        )


def _plain(path: Any) -> str:
    return str(path if isinstance(path, str) else path.path).replace("[", ".").replace("]", "")
