"""Envoys that can be traced, and `NNsight`, the model class for any `nn.Module`."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, cast

import torch
from torch import nn

from nnsight._frames import at_users_line, hide
from nnsight._wrappable import check_module
from nnsight.capture.callsite import is_with_item
from nnsight.config import CONFIG
from nnsight.errors import NoInputError, PluginError, WrapError
from nnsight.joint.batching import Batch, Rows
from nnsight.joint.joining import accepts, join_inputs, leading_size
from nnsight.joint.tables import tables_of
from nnsight.kernel import envoy as kernel
from nnsight.plugins import hooks
from nnsight.protocols import Inputs
from nnsight.tracing import saving
from nnsight.tracing.tracer import Tracer

P = ParamSpec("P")

NO_INPUT = (
    "Cannot return output of Envoy `{path}`: this trace has no input, so there is nothing to run. Give it one, "
    "`with model.{method}(input):`, or open `with tracer.invoke(input):` blocks inside it."
)


class Envoy(kernel.Envoy):
    """Mirrors one module, and can be traced on its own."""

    if not TYPE_CHECKING:  # type checkers want a `def`, which the base class has
        __getattr__ = at_users_line(kernel.Envoy.__getattr__)
        __getitem__ = at_users_line(kernel.Envoy.__getitem__)

    def trace(
        self, *args: Any, trace: bool = True, fn: Callable[..., Any] | str | None = None, remote: Any = False,
        backend: Any = None, batched: bool = True, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Run the module once with a block: `with model.trace(x) as tracer:`.

        Args:
            *args: the model's input, as the model class takes it.
            trace: False runs the module without a block and returns its output.
            fn: what to run instead of the module itself: a callable that drives it, or the name of a method.
            remote: where to run; False is here.
            backend: what carries the block there.
            batched: False runs invokes one after another, each exactly as it would run alone.
            **kwargs: for the module's forward.

        Returns:
            A `Tracer` to be entered, or the output when `trace` is False.

        Raises:
            InputError: the input cannot be used.
        """
        if trace:
            return self._open("trace", fn, args, kwargs, remote, backend, batched)
        try:
            return self._run_plainly("trace", fn, args, kwargs)
        except BaseException as error:
            hide(error)
            raise

    def _open(
        self, method: str, function: Callable[..., Any] | str | None, args: tuple[Any, ...], kwargs: dict[str, Any],
        remote: Any, backend: Any, batched: bool,
    ) -> Tracer:  # fmt: skip
        if remote or backend is not None:
            from nnsight import plugins  # lazy: a transport is a plugin

            opened: Tracer = plugins.open_remote(self, method, args, kwargs, remote, backend, function, batched)
            return opened
        return Tracer(self, method, function, args, kwargs, batched)

    def _run_plainly(
        self, method: str, function: Callable[..., Any] | str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        tracer = Tracer(self, method, function, args, kwargs)
        with tracer:
            result = tracer.result
        return result

    def _prepare(self, root: Envoy, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Turn the user's arguments into the call's. A part of a model takes them as they are."""
        if isinstance(root, NNsight):
            if not root.dispatched:
                root.dispatch()
            if root is self:
                return root.prepare(method, args, kwargs)
        return Inputs(args, kwargs, leading_size(args, kwargs))

    def _traced_root(self) -> Envoy:
        return cast("Envoy", self._find_root())

    def _failed(self, name: str, error: BaseException) -> None:
        super()._failed(name, error)
        hide(error)

    def _join(self, inputs: Sequence[Inputs]) -> Inputs:
        """Join what invokes feed this module. A part of a model takes tensors as they are."""
        if isinstance(self, NNsight):
            return self.join(inputs)
        return join_inputs(inputs)

    def _rows(self) -> Rows:
        """Return what says which slice of dim 0 of a tensor is an invoke's."""
        root = self.root
        return root.rows if isinstance(root, NNsight) else partial(NNsight.rows, self)  # type: ignore[arg-type]

    def _tables(self) -> set[int]:
        """Return the storages of the model's parameters and buffers: they hold no rows of a batch."""
        return tables_of(self.root._module)

    def _without_input(
        self, method: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        """Return what a trace without input runs: the model if it can be called so, else the error that says so."""
        if not getattr(self.root, "requires_input", False) and accepts(function, args, kwargs):
            return function

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise NoInputError(NO_INPUT.format(path=path, method=method))

        path = self._path
        return refuse

    def next(self, step: int = 1) -> Self:
        """Let the block's requests that follow mean a later step; return this envoy: `model.lm_head.next().output`.

        Args:
            step: how many steps later, 1 or more.
        """
        self._seat("next")[0].advance(step)
        return self

    def _lookup(self, name: str) -> Any:
        from nnsight import plugins  # lazy: a name that only a plugin may provide

        function = plugins.lookup("nnsight.envoy", name)
        return None if function is None else function(self)

    def __dir__(self) -> list[str]:
        from nnsight import plugins  # lazy: as above

        return sorted({*super().__dir__(), *plugins.names("nnsight.envoy")})


class NNsight(Envoy):
    """Wraps any `nn.Module` so that blocks can read and change what happens in it.

    Args:
        module: the model. Wrapping changes nothing on it.
        rename: other names for modules: name, dotted path (`*` for any one part) or class -> alias, or a list of them.
        envoys: envoy classes for modules: class or path -> a subclass of `Envoy`; or one subclass for all.
        strict_rename: whether a key of `rename` that matches nothing is an error.

    Raises:
        WrapError: it is no `nn.Module`, or one that cannot be looked into.
        NamingError: two modules would have one name, or a key matches nothing and `strict_rename` is set.
    """

    #: Whether a call without input is an error even where the traced method would accept it.
    requires_input = False
    #: Whether the weights are loaded. A module that was given has them; classes that load lazily say when.
    dispatched: Any = True

    @at_users_line
    def __init__(self, module: nn.Module, rename: Any = None, envoys: Any = None, strict_rename: bool = False) -> None:
        if isinstance(module, kernel.Envoy):
            raise WrapError(f"`{module.path}` is wrapped already; use it as it is, or wrap its `._module`.")
        check_module(module)
        if rename or envoys:
            from nnsight import plugins  # lazy: names are given by a plugin

            self._naming = plugins.resolve("nnsight.envoy", "rename").naming(rename, envoys, strict_rename)
        self._build(module)
        hooks.wrapped(self)
        saving.mount()
        _mount_gradients()
        _start_recording()

    def _class_of(self, path: str, module: nn.Module) -> type[kernel.Envoy]:
        return Envoy if self._naming is None else self._naming.class_of(path, module, Envoy)

    def prepare(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Turn what the user gave a trace or an invoke into the arguments of the traced call.

        Args:
            method: the method that was called on the model: `trace`, `generate`, ...
            args: the user's positional arguments.
            kwargs: the user's keyword arguments.

        Returns:
            The arguments, and how many rows of the batch they are (None: no input).

        Raises:
            InputError: they cannot be used.
        """
        return Inputs(args, kwargs, leading_size(args, kwargs))

    def join(self, inputs: Sequence[Inputs]) -> Inputs:
        """Join what several invokes feed the model into one call.

        Args:
            inputs: what `prepare` returned for each invoke that has an input, in order.

        Returns:
            The joint call; its rows are those of the inputs one after another.

        Raises:
            BatchError: they cannot be joined.
        """
        return join_inputs(inputs)

    def rows(self, tensor: torch.Tensor, batch: Batch) -> slice | None:
        """Return which slice of dim 0 of a tensor holds the rows of one invoke; None when it holds no rows.

        Args:
            tensor: a value of the run, any shape but ().
            batch: the invoke's rows, and the joint call.
        """
        if tensor.shape[0] != batch.joint.total:
            return None
        return slice(batch.start, batch.start + batch.size)

    def dispatch(self) -> None:
        """Load the weights if they are not yet. Called before the first run; classes that load lazily load here."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NNsight:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Return the module and the wrapper's own attributes; envoys are made again from them."""
        own = {name: value for name, value in self.__dict__.items() if not _is_mirror(name, value)}
        return {"module": self._module, "own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["own"])
        self._build(state["module"])


def traceable(
    method: Callable[Concatenate[Any, P], Any],
) -> Callable[Concatenate[Any, P], Any]:
    """Make a method of a model class traceable: in `with model.method(...):` it opens a block, elsewhere it just runs.

    The method itself runs the model, on the model side, with prepared arguments.
    """
    name = method.__name__

    @wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
        remote, backend = kwargs.pop("remote", False), kwargs.pop("backend", None)
        batched = bool(kwargs.pop("batched", True))
        function = method.__get__(self, type(self))
        if kwargs.pop("trace", True) and is_with_item(sys._getframe(1)):
            return self._open(name, function, args, kwargs, remote, backend, batched)
        try:
            return self._run_plainly(name, function, args, kwargs)
        except BaseException as error:
            hide(error)
            raise

    call.is_traceable = True  # type: ignore[attr-defined]  # a transport looks for what it may run
    return cast("Callable[Concatenate[Any, P], Any]", call)


@cache
def _mount_gradients() -> None:
    """Let `with loss.backward():` trace from now on, unless the plugin for it is switched off."""
    from nnsight import plugins  # lazy: the catalogue of plugins is read when the first model is wrapped

    with contextlib.suppress(PluginError):
        gradients = plugins.lookup("nnsight.tracer", "backward")
        if gradients is not None:
            gradients.mount()


@cache
def _start_recording() -> None:
    """Record from now on what traces ask for, if the settings say so."""
    if CONFIG.APP.EXPLAIN:
        import nnsight  # lazy: it stands above

        nnsight.explain.on()


_MIRROR = (
    "_module", "_tree", "_path", "_number", "_output_at", "_parent", "_root", "_children", "_envoys",
    "_instrumentation", "edits", "_aliases",
)  # fmt: skip


def _is_mirror(name: str, value: object) -> bool:
    return name in _MIRROR or isinstance(value, kernel.Envoy)
