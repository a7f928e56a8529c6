"""Paths as users write them: from the root or below it, under original names or aliases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nnsight.kernel.envoy import Envoy
from nnsight.kernel.location import ROOT

#: Where a name that is not the module's own leads: (path of the parent, name) -> path.
Table = dict[tuple[str, str], str]


def walk(envoy: Envoy, names: Sequence[str], aliases: Mapping[int, Mapping[str, Envoy]] | None = None) -> Envoy | None:
    """Return the envoy that a sequence of names leads to, or None.

    Args:
        envoy: where to start.
        names: names of modules, or aliases.
        aliases: the aliases by `id` of the envoy they are reached from, while they are not in the tree yet.
    """
    for name in names:
        found = envoy._children.get(name)
        if found is None:
            found = envoy._aliases.get(name) if aliases is None else aliases.get(id(envoy), {}).get(name)
        if found is None and not name.startswith("_") and name not in envoy._aliases:
            found = envoy.__dict__.get(name)  # mounted beside the model's own modules, or `E_output`
        if not isinstance(found, Envoy):
            return None
        envoy = found
    return envoy


def find(root: Envoy, path: str) -> Envoy | None:
    """Return the envoy at a path as a user writes it: the root's own name `model` may be left out."""
    names = path.split(".") if path else []
    found = walk(root, names)
    if found is None and names and names[0] == ROOT:
        found = walk(root, names[1:])
    return found


def every_name(root: Envoy) -> list[str]:
    """Return all paths below a root under which a module can be reached by one alias at most, for suggestions."""
    envoys = [root, *root._envoys.values()]
    return [envoy._path for envoy in envoys] + [f"{e._path}.{alias}" for e in envoys for alias in e._aliases]


def table_of(root: Envoy) -> Table:
    """Return where the names lead that are not the modules' own: aliases, and modules met again."""
    table: Table = {}
    for envoy in (root, *root._envoys.values()):
        for name, child in envoy._children.items():
            if child._path != f"{envoy._path}.{name}":
                table[envoy._path, name] = child._path
            if name in envoy._own:
                table[envoy._path, f"E_{name}"] = child._path
        for alias, target in envoy._aliases.items():
            table[envoy._path, alias] = target._path
    return table
