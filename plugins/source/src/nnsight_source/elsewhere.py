"""Sources in a process that has no forwards: there a function is what the model's process says of it.

`described` makes plain data of a function, where the model is. `made` makes a source of such data, where a block is;
what is asked for in it becomes requests for locations like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn

from nnsight import Envoy, InputError, Mediator, OutsideTraceError, Places
from nnsight_source.errors import SourceError
from nnsight_source.live import find_live
from nnsight_source.site import Site
from nnsight_source.source import Source
from nnsight_source.spots import WRAPPER, Rewritten, Spot

#: Asks the model's process: a module's path, the steps to the function, how (see `described`); returns the data.
Ask = Callable[[str, list[str], str], Any]
#: Is told where locations have their numbers: the first there, how many, the first here.
Placed = Callable[[int, int, int], None]

_WRAPPER = WRAPPER[1:]


def described(envoy: Envoy, steps: list[str], how: str) -> tuple[Site, dict[str, Any]] | None:
    """Return a function, and plain data that tells of it; None where it is not known before it is called.

    Args:
        envoy: mirrors a module.
        steps: how to come from its forward to the function: names of calls, and `wrapper`.
        how: "apart": no block is open that could wait for the last call. "before": one is. "at": the model stands at
            the last call.

    Raises:
        SourceError: there is no such function, or it has no source.
    """
    envoy.source  # noqa: B018 - in a block its run looks into the forward from now on
    site = Site.of_module(envoy)
    for number, step in enumerate(steps):
        if step == _WRAPPER:
            site = site.wrapper()
            continue
        spot = site.rewritten.spots["call"].get(step)
        if spot is None:
            raise SourceError(f"`{site.path}` has no operation {step!r}.")
        if how == "before" and number == len(steps) - 1 and not _is_known(site, spot):
            return None
        site = site.called(spot)
    site.look_into()
    return site, _data(site)


def _is_known(site: Site, spot: Spot) -> bool:
    """Return whether what an operation calls is known without waiting for the call."""
    if spot.kind != "call" or spot.input < 0 or isinstance(site._resolve(spot), nn.Module):
        return True
    try:
        mediator, first = site.enter(spot, "source")
    except OutsideTraceError:
        return False
    live = None if mediator.run is None else find_live(mediator.run, first)
    return live is not None and spot.input in live.known


def _about(function: Any) -> list[Any] | None:
    """Return what messages say of a function: its name, its file and the line it begins at."""
    if function is None:
        return None
    code = function.__code__
    return [code.co_qualname, code.co_filename, code.co_firstlineno]


def _data(site: Site) -> dict[str, Any]:
    steps: list[str] = []
    at: Site | None = site
    while at is not None:
        steps = [*[_WRAPPER] * at.layer, *steps]
        steps, at = ([at.outer[1].name, *steps], at.outer[0]) if at.outer is not None else (steps, None)
    rewritten = site.rewritten
    spots = [
        [spot.kind, spot.name, spot.input, spot.output, spot.given, spot.callee, list(spot.span),
         [list(entry) for entry in spot.under], spot.after]
        for kind in rewritten.spots.values() for spot in kind.values()
    ]  # fmt: skip
    return {
        "path": site.envoy.path, "steps": steps, "around": _about(site.wrapped_in), "first": site.places.first,
        "size": rewritten.size, "spots": spots, "lines": list(rewritten.lines), "line": rewritten.first,
        "file": rewritten.file, "name": rewritten.name,
    }  # fmt: skip


def enter(site: Site, offset: int) -> None:
    """Let the run of the open block look into a function, where it is asked for one of its locations.

    Args:
        site: the function.
        offset: the number of the location, counted from the function's first.

    Raises:
        OutOfOrderError: it cannot be told which occurrences of the operation the run has passed.
    """
    for kind in site.rewritten.spots.values():
        for spot in kind.values():
            if offset in (spot.input, spot.output):
                site.enter(spot, "input" if offset == spot.input else "output")
                return


def made(find: Callable[[str], Envoy], path: str, ask: Ask, placed: Placed) -> Source:
    """Return the source of a module's forward, in a process that does not have it.

    Args:
        find: returns the envoy at a path.
        path: the module's.
        ask: asks the model's process.
        placed: is told which numbers the locations have there and here.
    """
    return Source(_Teller(find, ask, placed).site(path, [], "apart"))


class _Teller:
    """Makes sites of what the model's process says."""

    def __init__(self, find: Callable[[str], Envoy], ask: Ask, placed: Placed) -> None:
        self.find = find
        self.ask = ask
        self.placed = placed

    def site(self, path: str, steps: list[str], how: str) -> Site:
        """Return a function that is known."""
        found = self.known(path, steps, how)
        if found is None:
            raise SourceError(f"`{path}` has nothing under {steps} that is known before it is called.")
        return found

    def known(self, path: str, steps: list[str], how: str) -> Site | None:
        """Return a function, None where it is not known before it is called."""
        data = self.ask(path, steps, how)
        if data is None:
            return None
        site = _SiteElsewhere(self, data)
        self.placed(data["first"], data["size"], site.places.first)
        return site


class _SiteElsewhere(Site):
    """A function that is in another process."""

    __slots__ = ("_around", "_steps", "_teller")

    def __init__(self, teller: _Teller, data: dict[str, Any]) -> None:
        self._teller = teller
        self._steps, self._around = data["steps"], data["around"]
        self.envoy = teller.find(data["path"])
        self.functions, self.owner, self.outer, self.layer = [], None, None, 0
        make: Any = Spot
        spots = [
            make(*fields, callee, tuple(span), tuple(map(tuple, under)), after)
            for *fields, callee, span, under, after in data["spots"]
        ]
        code = _nothing.__code__.replace(co_filename=data["file"], co_qualname=data["name"])
        self.rewritten = Rewritten(code, spots, data["size"], tuple(data["lines"]), data["line"], ())
        prefix = ".source" + "".join(f".{s}" if s == _WRAPPER else f".{s}.source" for s in self._steps)
        self.path = self.envoy.path + prefix
        explain = self.rewritten.explain if self._around is None else self.rewritten.explain_wrapped
        below = self.rewritten.below(prefix)
        self.places = Places(self.envoy, (prefix, data["first"]), below, explain, self.rewritten.given)

    @property
    def wrapped_in(self) -> FunctionType | None:
        if self._around is None:
            return None
        name, file, line = self._around
        return FunctionType(_nothing.__code__.replace(co_qualname=name, co_filename=file, co_firstlineno=line), {})

    def wrapper(self) -> Site:
        if self._around is None:
            raise SourceError(f"`{self.path}` is wrapped in nothing that can be looked into, so it has no `.wrapper`.")
        return self._teller.site(self.envoy.path, [*self._steps, _WRAPPER], "apart")

    def enter(self, spot: Spot, port: str) -> tuple[Mediator, int]:
        mediator, first, _ = self.places.seat(f"{self.path.removeprefix(self.envoy.path + '.')}.{spot.label}.{port}")
        return mediator, first

    def look_into(self) -> None:
        pass  # the model's process does, as soon as it is asked

    def locate(self, block: Mediator) -> int:
        mediator, first, _ = self.places.seat("source")
        if mediator is not block:
            raise InputError(f"`{self.path}` is of another model than the one traced.")
        return first

    def called(self, spot: Spot) -> Site:
        path, steps = self.envoy.path, [*self._steps, spot.name]
        try:
            mediator, first = self.enter(spot, "source")
        except OutsideTraceError:
            return self._teller.site(path, steps, "apart")
        found = self._teller.known(path, steps, "before")
        if found is None:
            mediator.read(first + spot.input)
            found = self._teller.site(path, steps, "at")
        return found


def _nothing() -> None: ...
