"""`with model.scan(x):`: a trace under fake tensors. Shapes, dtypes and devices are there, values are not.

The mode holds on both sides of the run. Whatever real tensor an operation meets, a weight or one of the caller's, is
stood in for by a fake one, so weights are neither needed nor touched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from nnsight._frames import hide
from nnsight.tracing.tracer import Tracer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight.builtin.fake import Restoration, ScanMode
    from nnsight.protocols import Inputs
    from nnsight.tracing.model import Envoy


def scan(envoy: Envoy) -> Callable[..., Any]:
    """Return the method `model.scan(...)`."""

    def open_scan(
        *args: Any, fn: Callable[..., Any] | str | None = None, trace: bool = True, remote: Any = False,
        batched: bool = True, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Run the module with a block, on shapes alone: `with model.scan(x): size = nnsight.save(m.output.shape)`.

        Everything a trace can do works: invokes, edits, steps, `stop`. A model that loads its weights when they are
        first needed does not load them.

        Args:
            *args: the model's input, as `trace` takes it.
            fn: what to run instead of the module itself, as for `trace`.
            trace: False runs the module without a block and returns its output, in fake tensors.
            remote: without effect: a scan needs no weights, so it always runs here.
            batched: as for `trace`.
            **kwargs: for the module's forward.

        Raises:
            ScanError: the model or the block needs the values of tensors.
        """
        tracer = ScanTracer(envoy, fn, args, kwargs, batched)
        if trace:
            return tracer
        try:
            with tracer:
                result = tracer.result
        except BaseException as error:
            hide(error)
            raise
        return result

    return open_scan


class ScanTracer(Tracer):
    """A run on fake tensors, and the block that takes part in it."""

    def __init__(
        self, envoy: Envoy, function: Callable[..., Any] | str | None, args: tuple[Any, ...], kwargs: dict[str, Any],
        batched: bool,
    ) -> None:  # fmt: skip
        self._scanned = _Scanned(envoy, function)
        super().__init__(cast("Envoy", self._scanned), "scan", self._scanned.make_call(), args, kwargs, batched)

    @property
    def envoy(self) -> Envoy:
        """What is scanned."""
        super().envoy  # noqa: B018 - raises when the tracer is not open
        return self._scanned._envoy

    if TYPE_CHECKING:

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
        ) -> None: ...
    else:

        def __exit__(self, kind, error, traceback) -> bool:
            try:
                return super().__exit__(kind, error, traceback)
            except BaseException as raised:
                hide(raised)
                raise
            finally:
                self._scanned.leave()


class _Scanned:
    """What the tracer takes for the envoy: the same, except that its inputs are prepared without weights.

    Args:
        envoy: what is scanned.
        function: what runs instead of the module: a callable, or the name of a method.
    """

    def __init__(self, envoy: Envoy, function: Callable[..., Any] | str | None) -> None:
        self._envoy = envoy
        self._function = function
        self._mode: ScanMode | None = None
        self._restoration: Restoration | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._envoy, name)

    def make_call(self) -> Callable[..., Any]:
        """Return what runs on the model side: it makes the arguments fake first."""
        function = self._function
        module = self._envoy._module
        called = getattr(module, function) if isinstance(function, str) else function or module

        # Its signature says whether the model can be called without an input.
        @wraps(called.forward if isinstance(called, nn.Module) else called)
        def call(*args: Any, **kwargs: Any) -> Any:
            assert self._mode is not None
            return called(*self._mode.fake_all(args), **self._mode.fake_all(kwargs))

        return call

    def _prepare(self, root: Envoy, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Prepare an input as it is, with its values; the first call, when the scan is entered, also sets the mode."""
        from nnsight.builtin import fake  # lazy: torch loads much for it

        with fake.without():
            if root is self._envoy:
                inputs: Inputs = cast("Any", root).prepare(method, args, kwargs)
            else:  # a part of a model takes its arguments as they are
                inputs = self._envoy._prepare(self._envoy, method, args, kwargs)
        if self._mode is None:
            self._enter(root)
        return inputs

    def _join(self, inputs: Sequence[Inputs]) -> Inputs:
        from nnsight.builtin import fake  # lazy: torch loads much for it

        with fake.without():
            return self._envoy._join(inputs)

    @property
    def root(self) -> Any:
        """The root, for who asks it for its weights: those that operations meet are stand-ins."""
        assert self._mode is not None
        module = self._envoy.root._module
        weights = [self._mode.fake_all(tensor) for tensor in (*module.parameters(), *module.buffers())]
        return SimpleNamespace(_module=SimpleNamespace(parameters=lambda: weights, buffers=lambda: ()))

    def _enter(self, root: Envoy) -> None:
        from nnsight.builtin.fake import Restoration, ScanMode  # lazy: torch loads much for it

        self._restoration = Restoration(root._module)
        self._mode = ScanMode.current() or ScanMode()
        self._mode.open()

    def leave(self) -> None:
        """End the mode, and put back what the run has left on the modules."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.close()
        if self._restoration is not None:
            self._restoration.undo()
            self._restoration = None
