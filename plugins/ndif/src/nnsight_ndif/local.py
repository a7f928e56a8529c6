"""`trace(..., remote="local")`: a block that is captured here and run in an isolated process on this machine."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nnsight import Capture, InputError, NNsight, UnsendableError, payload
from nnsight_ndif import job, launch
from nnsight_ndif.errors import NotInRunnerError, RunnerWarning, function_of
from nnsight_ndif.isolation import Limits
from nnsight_ndif.kinds import kinds_of
from nnsight_ndif.seat import Seat
from nnsight_ndif.served import methods_of, modes_here

#: What most jobs of such a process will import, so that it is there when a runner is forked.
_WORTH_PRELOADING = ("torch._dynamo", "transformers.cache_utils", "transformers.modeling_outputs")


def open_remote(
    envoy: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], remote: Any, backend: Any,
    function: Callable[..., Any] | str | None = None, batched: bool = True,
) -> Any:  # fmt: skip
    """Open a trace whose block runs in another process.

    Args:
        envoy: what is traced.
        method: the method that opened the trace.
        args: the user's arguments.
        kwargs: the user's keyword arguments.
        remote: where: "local" for a process on this machine.
        backend: a transport of the user's.
        function: what runs the model, where it is not the module itself.
        batched: whether invokes are one batch.

    Raises:
        InputError: there is no such place.
        NotInRunnerError: it cannot do what was asked.
    """
    if backend is None and remote == "local":
        return Local().open_block(envoy, method, args, kwargs, function, batched)
    what = f"remote={remote!r}" if backend is None else f"backend={backend!r}"
    raise InputError(f"There is no place {what} here yet: `remote='local'` runs a block in a process of its own.")


class Local:
    """A place for blocks: a process of their own on this machine, `model.trace(x, backend=Local(limits))`.

    Args:
        limits: what one block may use.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    def open_block(
        self, envoy: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], function: Any, batched: bool
    ) -> LocalRun:
        """Return what captures a block and runs it there.

        Raises:
            NotInRunnerError: a method of the model is to run it, by its name.
        """
        driver = function_of(function) if method == "trace" and function is not None else None
        return LocalRun(envoy, method, args, kwargs, driver, batched, self.limits)


class LocalRun(Capture):
    """A `with` item whose body runs in a runner."""

    what = "trace"

    def __init__(
        self, envoy: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any],
        function: Callable[..., Any] | None, batched: bool, limits: Limits,
    ) -> None:  # fmt: skip
        self._function = function
        self._envoy = envoy
        self._method = method
        self._arguments = (args, kwargs)
        self._batched = batched
        self._limits = limits
        self._outside: payload.Outside | None = None

    def _captured(self, block: Any) -> None:
        scope, root = block.scope, self._envoy.root
        if not isinstance(root, NNsight):
            raise NotInRunnerError("Only a part of a wrapped model can be traced in a runner.")
        if not root.dispatched:
            root.dispatch()
        preload = [name for name in (*_WORTH_PRELOADING, *_modules_of(root)) if name in sys.modules]
        runner = launch.zygote(preload).start(self._limits)
        seat = None
        try:
            seat = Seat(root, methods_of(root), runner, _print, _warn, self._limits.printed, self._limits.memory)
            own: payload.Own = {}
            order = self._order(scope, root, runner.outgoing.put, own)
            result = seat.serve(order)
            names = scope.block.bound | scope.block.declared_global
            assert self._outside is not None
            results = job.Results(result, names, seat.shown, runner.incoming, seat.parts, root, own, self._outside)
        finally:
            runner.close()
            if seat is not None:
                seat.close()
            self._outside = None
        for change in results.todo:
            change()
        for what, reason in results.lost:
            message = f"The block has changed `{what}`, and that stays in its process: {reason}"
            warnings.warn_explicit(message, RunnerWarning, scope.block.filename, scope.block.node.lineno)
        scope.give(results.bound)
        scope.close()
        if results.error is not None:
            raise results.error

    def _order(
        self, scope: Any, root: Any, put: Callable[[torch.Tensor], Any], own: payload.Own
    ) -> dict[str, Any]:  # fmt: skip
        device, kinds, untold = root.device or torch.device("cpu"), kinds_of(root), ""
        driving = {} if self._function is None else {"functions": self._function}
        pack = partial(payload.pack_blocks, root, [scope], put, own, self._tell, arguments=self._arguments, **driving)
        try:
            sent = pack(kinds=kinds)
        except UnsendableError as error:
            if not kinds:
                raise
            sent, untold = pack(kinds={}), str(error)  # unless the block cannot travel itself, it can do without
        return {
            "sent": sent, "untold": untold,
            "method": self._method, "path": self._envoy.path, "seed": _seed(), "modes": modes_here(device.type),
            "default_dtype": str(torch.get_default_dtype()).partition(".")[2], "batched": self._batched,
        }  # fmt: skip

    def _tell(self, outside: payload.Outside) -> None:
        self._outside = outside


def _modules_of(root: NNsight) -> list[str]:
    """Return the modules of installed packages that define the class of a model."""
    names = {kind.__module__ for kind in type(root).__mro__}
    return [name for name in sorted(names) if name in sys.modules and payload.is_installed(sys.modules[name])]


def _seed() -> int:
    """Return a seed that follows from the caller's, without using up any of the caller's random numbers."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return int(torch.randint(1 << 62, (), generator=generator))


def _print(stream: str, text: str) -> None:
    print(text, end="", file=getattr(sys, stream))


def _warn(message: str, category: tuple[str, str], filename: str, line: int) -> None:
    found: Any = sys.modules.get(category[0])
    for part in category[1].split("."):
        found = getattr(found, part, None)
    kind = found if isinstance(found, type) and issubclass(found, Warning) else UserWarning
    warnings.warn_explicit(message, kind, filename, line, registry={})
