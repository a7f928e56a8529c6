"""The names that the user gave to modules, in a runner: the tree of stand-ins has them, too."""

from __future__ import annotations

from typing import Any

from nnsight import Envoy


def describe_names(root: Envoy) -> list[list[str]]:
    """Return where each name is put, the name, and the path of the module that it leads to."""
    envoys = [root, *root._envoys.values()]
    return [[envoy.path, alias, target.path] for envoy in envoys for alias, target in envoy._aliases.items()]


class GivenNames:
    """Gives a tree the names of the model's; what `nnsight.protocols.Naming` asks for.

    Args:
        names: what `describe_names` returns.
        kind: the class of every envoy.
    """

    def __init__(self, names: list[list[str]], kind: type[Envoy]) -> None:
        self._names = names
        self._kind = kind

    def class_of(self, path: str, module: Any, default: type[Any]) -> type[Any]:
        return self._kind

    def apply(self, root: Any) -> None:
        """Give the names. They were checked where the user gave them."""
        envoys = {envoy.path: envoy for envoy in (root, *root._envoys.values())}
        for mount, alias, target in self._names:
            if mount in envoys and target in envoys:
                values = envoys[mount].__dict__
                values.setdefault("_aliases", {})[alias] = values[alias] = envoys[target]
                root._tree.aliases.setdefault(target, (mount, alias))
