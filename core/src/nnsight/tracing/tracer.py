"""`with model.trace(...) as tracer:`: an inline block and the run it belongs to.

The body runs where it stands. Entering prepares the input and starts nothing; the first request starts the model and
runs it up to that location; leaving lets it finish, or takes it down when the body raised.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from nnsight.errors import NotInTreeError, TracerStateError
from nnsight.kernel import ambient
from nnsight.kernel.blocks import close_block, find, open_block, require, wrong_thread
from nnsight.kernel.interleaver import Interleaver
from nnsight.kernel.mediator import Mediator, StopBlock

if TYPE_CHECKING:
    from nnsight.tracing.model import Envoy

_REUSED = (
    "This tracer has been entered already, and a tracer is one run. Call `model.{method}(...)` again for another run."
)
_NOT_ENTERED = (
    "This tracer is not open. `model.{method}(...)` needs its `with`: `with model.{method}(...) as tracer:`, and the "
    "tracer works inside that block."
)


class Tracer:
    """One run of a model and the block that takes part in it."""

    def __init__(
        self, envoy: Envoy, method: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Keep what to run.

        Args:
            envoy: what is traced.
            method: the name of the method that opened the trace, for messages and for `prepare`.
            function: runs the model, called with the prepared arguments on the model side.
            args: the user's arguments, not yet prepared.
            kwargs: the user's keyword arguments.
        """
        self._envoy: Envoy | None = envoy
        self._method = method
        self._function: Callable[..., Any] | None = function
        self._args, self._kwargs = args, kwargs
        self._run: Interleaver | None = None
        self._mediator: Mediator | None = None
        self._frame: FrameType | None = None

    def __enter__(self) -> Self:
        envoy, function = self._envoy, self._function
        if envoy is None or function is None or self._run is not None:
            raise TracerStateError(_REUSED.format(method=self._method))
        frame = sys._getframe(1)
        root = envoy.root
        inputs = envoy._prepare(self._method, self._args, self._kwargs)
        if inputs.rows is None:
            function = envoy._without_input(self._method, function)
        run = Interleaver(root._instrumentation, root._module, function, copy_context(), ambient.probe())
        run.args, run.kwargs = inputs.args, inputs.kwargs
        assert run.carrier is not None
        mediator = Mediator(run, run.carrier.resume, run.carrier.pause)
        mediator.frame, mediator.line = frame, frame.f_lineno
        self._run, self._mediator, self._frame = run, mediator, frame
        open_block(frame, mediator)
        return self

    if TYPE_CHECKING:
        # Declared to return nothing: a checker would otherwise take every name the block binds for possibly unbound.
        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
        ) -> None: ...
    else:

        def __exit__(self, kind, error, traceback) -> bool:
            run, mediator = self._run, self._mediator
            if run is None or mediator is None:
                return False
            if mediator.thread != threading.get_ident():
                self._leave_to_its_thread(run, mediator)
            try:
                if error is None:
                    run.finish()
                    run.raise_error()
                    return False
                run.unwind()
                return isinstance(error, StopBlock) and error.mediator is mediator
            finally:
                self._end(run, mediator)

    def _leave_to_its_thread(self, run: Interleaver, mediator: Mediator) -> None:
        """Close a block from a thread that is not its own, and say so."""
        failure = wrong_thread("The end of a block", mediator)
        run.abandon()
        self._end(run, mediator)
        raise failure

    def _end(self, run: Interleaver, mediator: Mediator) -> None:
        """Refer to nothing any more."""
        assert self._frame is not None
        close_block(self._frame, mediator)
        mediator.close()
        run.close()
        self._run = self._mediator = self._frame = self._envoy = self._function = None
        self._args, self._kwargs = (), {}

    @property
    def result(self) -> Any:
        """What the traced call returns: the model's output, or the generated ids. Ends the run when read."""
        mediator = self._current("result")
        assert mediator.tree is not None
        return mediator.read(mediator.tree.result)

    def stop(self) -> None:
        """End the block here and the run with it; what follows in the block is not run."""
        self._current("stop").stop()

    def _current(self, what: str) -> Mediator:
        """Return the block of this run that the calling code is in."""
        mediator = self._mediator
        if mediator is None or mediator.tree is None:
            raise TracerStateError(_NOT_ENTERED.format(method=self._method))
        return find(mediator.tree) or require(mediator.tree, "tracer", what)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        from nnsight import plugins  # lazy: a name that only a plugin may provide

        function = plugins.lookup("nnsight.tracer", name)
        if function is None:
            raise NotInTreeError(f"A tracer has no {name!r}, and no installed plugin provides it.")
        return function.__get__(self, type(self))
