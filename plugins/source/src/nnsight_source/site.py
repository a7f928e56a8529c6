"""One function inside one module: where its operations are located, and how a block comes to stand at them."""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from nnsight import (
    Envoy,
    InputError,
    Mediator,
    OrphanError,
    OutOfOrderError,
    OutsideTraceError,
    Places,
    WrongThreadError,
)
from nnsight_source.errors import SourceError
from nnsight_source.live import Live, find_live, look_into_call, look_into_module
from nnsight_source.peel import module_of, peel
from nnsight_source.place import Anchor
from nnsight_source.rewrite import rewritten
from nnsight_source.spots import WRAPPER, Rewritten, Spot

_UNCOUNTED = (
    "Value was missed for `{path}`: the run had already made {passes} passes over `{name}` when something in it was "
    "first asked for, and it is not known how many of them reached this operation. Ask for it before what runs later, "
    "or take `{source}` before the first pass (`inside = {source}`, in the block): from then on all are counted."
)
_ENTERED = (
    "Value was missed for `{path}`: the run is inside `{name}` already{where}, and nothing in it was asked for before "
    "it was called, so this call of it cannot be looked into any more. Take `{source}` before the first request for "
    "something that runs inside (`inside = {source}`, in the block), then ask `inside` for it."
)
_UNRESOLVED = (
    "What `{path}` calls (`{callee}`) is known only at the moment of the call: use its `.source` inside a trace, "
    "`with model.trace(input):`."
)
_NOTHING: Any = object()


class Site:
    """One function inside one module.

    Args:
        envoy: mirrors the module.
        functions: the function and what it is wrapped in, as they are now, innermost first.
        owner: what the function is bound to, None for nothing.
        outer: the function and the operation that calls this one; None for the module's forward.
        layer: which of the functions it is.

    Attributes:
        path: what `.source` of it is called in messages.
    """

    __slots__ = ("envoy", "functions", "layer", "outer", "owner", "path", "places", "rewritten")
    path: str

    def __init__(
        self,
        envoy: Envoy,
        functions: list[FunctionType],
        owner: Any = None,
        outer: tuple[Site, Spot] | None = None,
        layer: int = 0,
    ) -> None:
        self.envoy = envoy
        self.functions = functions
        self.owner = owner
        self.outer = outer
        self.layer = layer
        self.rewritten: Rewritten = rewritten(functions[layer])
        prefix = "" if outer is None else f"{outer[0].path.removeprefix(envoy.path)}.{outer[1].label}"
        prefix += ".source" + WRAPPER * layer
        self.path = envoy.path + prefix
        explain = self.rewritten.explain if self.wrapped_in is None else self.rewritten.explain_wrapped
        self.places = Places(
            envoy, (prefix, self.rewritten), self.rewritten.below(prefix), explain, self.rewritten.given
        )

    @classmethod
    def of_module(cls, envoy: Envoy) -> Site:
        """Return the site of a module's forward."""
        module = envoy._module
        anchor = Anchor(module)
        inner = module_of(anchor.value)
        if inner is not None and inner is not module:
            return cls.of_module(envoy_of(inner, envoy))
        return cls(envoy, peel(anchor.value)[0], _owner(anchor.value, None if anchor.name else module))

    @property
    def wrapped_in(self) -> FunctionType | None:
        """What the function is wrapped in: the work of a decorator. None for nothing."""
        return self.functions[self.layer + 1] if self.layer + 1 < len(self.functions) else None

    def wrapper(self) -> Site:
        """Return the site of what the function is wrapped in.

        Raises:
            SourceError: it is wrapped in nothing, or in what has no source.
        """
        if self.wrapped_in is None:
            raise SourceError(f"`{self.path}` is wrapped in nothing that can be looked into, so it has no `.wrapper`.")
        return Site(self.envoy, self.functions, self.owner, self.outer, self.layer + 1)

    def enter(self, spot: Spot, port: str) -> tuple[Mediator, int]:
        """Return the block that a request belongs to, and the number of the function's first location in its run.

        The run looks into the function from now on.

        Raises:
            OutsideTraceError: no block of this model is open here.
            OutOfOrderError: it cannot be told which occurrences of the operation the run has passed.
        """
        name = f"{self.path.removeprefix(self.envoy.path + '.')}.{spot.label}.{port}"
        mediator, first, around = self.places.seat(name)
        run = mediator.run
        if run is not None and not run.is_over:
            live = find_live(run, first) or self._look_into(mediator, first, around)
            if live.passes:
                self._check_counted(mediator, live, spot)
        return mediator, first

    def look_into(self) -> None:
        """Let the run of the block that the calling code is in look into the function from now on; if there is one."""
        try:
            mediator, first, around = self.places.seat("source")
        except (OrphanError, OutsideTraceError, WrongThreadError):
            return
        run = mediator.run
        if run is not None and not run.is_over and find_live(run, first) is None:
            self._look_into(mediator, first, around)

    def locate(self, block: Mediator) -> int:
        """Let the run of a block look into the function from now on; return the number of the first location.

        Raises:
            InputError: the block that the calling code is in is another one.
        """
        mediator, first, around = self.places.seat("source")
        if mediator is not block:
            raise InputError(f"`{self.path}` is of another model than the one traced.")
        if mediator.run is not None and find_live(mediator.run, first) is None:
            self._look_into(mediator, first, around)
        return first

    def _check_counted(self, mediator: Mediator, live: Live, spot: Spot) -> None:
        """Refuse an occurrence that lies in a pass before the run looked in, or depends on what such passes reached.

        Step n of a loop over steps is the n-th pass from then on, too: earlier passes count as one each.
        """
        run, step, passes = mediator.run, mediator.step, live.passes
        assert run is not None and run.tree is not None
        if live.is_entered and step == passes - 1 and run.count(live.first + spot.output) <= passes:
            message = _ENTERED
        elif step is None or spot.is_always_reached or (step >= passes and not spot.is_repeated):
            return
        else:
            message = _UNCOUNTED
        where = f" (it stands at `{run.tree[run.at]}`)" if run.at >= 0 else ""
        raise OutOfOrderError(
            message.format(
                path=f"{self.path}.{spot.label}", source=self.path, name=self.rewritten.name, passes=passes, where=where
            )
        )

    def _look_into(self, mediator: Mediator, first: int, around: int) -> Live:
        run = mediator.run
        assert run is not None
        if self.outer is None:
            return look_into_module(run, first, around, self.envoy._module, self.rewritten, self.layer)
        outer, spot = self.outer
        _, outer_first = outer.enter(spot, "source")
        live = find_live(run, outer_first)
        assert live is not None
        return look_into_call(run, first, live, spot.input, self.rewritten, self.layer)

    # -- what an operation calls -----------------------------------------------------------------------------------

    def called(self, spot: Spot) -> Site:
        """Return the site of the function that an operation calls.

        In a block, the block waits for the call unless that function is looked into already. Elsewhere it is what the
        names in the source mean now.

        Raises:
            SourceError: it has no source, or is not known before it is called.
        """
        path = f"{self.path}.{spot.label}"
        if spot.kind != "call" or spot.input < 0:
            what = "is no call" if spot.kind != "call" else "must be called from the frame it stands in"
            raise SourceError(f"`{path}` {what}, so there is nothing inside it to look into.")
        target = self._resolve(spot)
        if isinstance(target, nn.Module):
            return self._site_of(target, spot, path)
        try:
            mediator, first = self.enter(spot, "source")
        except OutsideTraceError:
            if target is _NOTHING:
                raise SourceError(_UNRESOLVED.format(path=path, callee=spot.callee or "an expression")) from None
            return self._site_of(target, spot, path)
        live = None if mediator.run is None else find_live(mediator.run, first)
        number = first + spot.input
        if live is not None and mediator.run is not None and live.inner.get(spot.input):
            step = mediator.step
            if step is None or mediator.run.count(number) > step:
                return self._known(live, spot, path)
        mediator.read(number)
        if live is None:
            live = find_live(mediator.run, first) if mediator.run is not None else None
        assert live is not None
        site = self._site_of(live.called[spot.input], spot, path)
        if site.outer is not None:
            live.known[spot.input] = site.functions, site.owner
            site.look_into()
        return site

    def _known(self, live: Live, spot: Spot, path: str) -> Site:
        functions, owner = live.known[spot.input]
        return Site(self.envoy, functions, owner, (self, spot))

    def _site_of(self, target: Any, spot: Spot, path: str) -> Site:
        if isinstance(target, nn.Module):
            return Site.of_module(envoy_of(target, self.envoy, path))
        return Site(self.envoy, peel(target)[0], _owner(target), (self, spot))

    def _resolve(self, spot: Spot) -> Any:
        """Return what the called path means where the function is defined, without calling anything."""
        if not spot.callee:
            return _NOTHING
        root, *names = spot.callee.split(".")
        function = self.functions[self.layer]
        if root in self.rewritten.variables:
            is_self = self.owner is not None and self.rewritten.arguments[:1] == (root,)
            found = self.owner if is_self else _NOTHING
        elif root in function.__code__.co_freevars:
            cell = (function.__closure__ or ())[function.__code__.co_freevars.index(root)]
            try:
                found = cell.cell_contents
            except ValueError:
                found = _NOTHING
        else:
            found = function.__globals__.get(root, getattr(builtins, root, _NOTHING))
        for name in names:
            found = getattr(found, name, _NOTHING) if found is not _NOTHING else _NOTHING
        return found


def envoy_of(module: nn.Module, near: Envoy, path: str = "") -> Envoy:
    """Return what mirrors a module that is called by something in the same model.

    Args:
        module: the module.
        near: an envoy of the model.
        path: what calls it, for the error; the envoy's module if not given.

    Raises:
        SourceError: it is not in the model.
    """
    envoys: Iterable[Envoy] = near.root.modules()
    for envoy in envoys:
        if envoy._module is module:
            return envoy
    raise SourceError(f"`{path or near.path}` calls a module that is not in the model, so it cannot be looked into.")


def _owner(target: Any, instance: Any = None) -> Any:
    """Return what a callable gives its function as the first argument; a function of a class that is `instance`."""
    if isinstance(target, MethodType):
        return target.__self__
    if isinstance(target, FunctionType):
        return instance
    return None if isinstance(target, partial | staticmethod | classmethod) else target
