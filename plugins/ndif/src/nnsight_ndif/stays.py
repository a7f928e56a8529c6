"""What a block sets where it cannot come back from: attributes of envoys and of classes. The caller is told."""

from __future__ import annotations

from typing import Any

from nnsight import Envoy, payload
from nnsight_ndif.values import is_data

_ENVOYS = "envoys of a runner are its own. Keep it in a variable of yours."
_CLASSES = "classes of a runner are its own. Keep it in an instance, a list or a variable of yours."
_OWN = ("edits", "untold")


class Stays:
    """Finds such attributes.

    Args:
        root: the stand-in of the model.
        sent: the block, which is not run yet.
    """

    def __init__(self, root: Envoy, sent: payload.SentBlocks) -> None:
        self._root = root
        made = [found for _, found in sent.made().values() if isinstance(found, type)]
        self._classes: list[tuple[type, dict[str, Any]]] = [(kind, dict(vars(kind))) for kind in made]

    def lost(self) -> list[list[Any]]:
        """Return what was set: a place that says what it is called, and why it stays."""
        found: list[list[Any]] = []
        for envoy in (self._root, *self._root._envoys.values()):
            for name, value in vars(envoy).items():
                if not name.startswith("_") and name not in _OWN and is_data(value):
                    found.append([["envoy", f"{envoy.path}.{name}"], _ENVOYS])
        for kind, before in self._classes:
            for name, value in vars(kind).items():
                if not name.startswith("__") and before.get(name, self) is not value:
                    found.append([["class", f"{kind.__qualname__}.{name}"], _CLASSES])
        return found
