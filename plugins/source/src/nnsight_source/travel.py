"""Sources and operations as data: a block that uses one travels with its module's path and the names on the way."""

from __future__ import annotations

from typing import Any

from nnsight import Envoy
from nnsight_source.site import Site
from nnsight_source.spots import WRAPPER, Spot

_WRAPPER = WRAPPER[1:]


def packed(site: Site) -> list[Any]:
    """Return a module's envoy, and how to come from its forward to a function."""
    return [site.envoy, _steps(site)]


def _steps(site: Site) -> list[str]:
    before = [] if site.outer is None else [*_steps(site.outer[0]), site.outer[1].name]
    return [*before, *[_WRAPPER] * site.layer]


def unpacked(content: Any) -> Site:
    """Return the site of what `packed` has told of; anybody may have written that.

    Raises:
        ValueError: it is no such thing, or the module has another forward here.
    """
    envoy, steps = content
    if not isinstance(envoy, Envoy):
        raise ValueError(f"a source is of a module, not of a {type(envoy).__name__}")
    site: Site = envoy.source._site  # not made here: where a block has no forwards, this says so
    for step in steps:
        site = site.wrapper() if step == _WRAPPER else site.called(spot_of(site, "call", step))
    return site


def spot_of(site: Site, kind: str, name: str) -> Spot:
    """Return an operation by its name."""
    return site.rewritten.spots[kind][name]
