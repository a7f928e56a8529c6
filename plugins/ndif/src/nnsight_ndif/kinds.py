"""Envoy classes of a model's in a runner: stand-ins have their methods, properties and views."""

from __future__ import annotations

from typing import Any

from nnsight import NNsight, payload


def kinds_of(root: NNsight) -> dict[str, type]:
    """Return the classes of envoys that are not the library's own, by path."""
    found = {}
    for path, envoy in root.named_modules():
        kind = type(envoy)
        if kind.__module__.partition(".")[0] != "nnsight":
            found[path] = kind
    return found


def give(root: NNsight, kinds: dict[str, type]) -> None:
    """Let stand-ins be of the model's classes, too. No `__init__` is called.

    Args:
        root: the stand-in of the model.
        kinds: what `kinds_of` returns for the model.
    """
    made: dict[tuple[type, type], Any] = {}
    for path, kind in kinds.items():
        envoy = payload.envoy_at(root, path)
        pair = type(envoy), kind
        if pair not in made:
            names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
            made[pair] = type(kind.__name__, pair, names)
        object.__setattr__(envoy, "__class__", made[pair])
