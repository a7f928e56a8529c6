"""`with model.trace(...) as tracer:`: an inline block and the run it belongs to.

The body runs where it stands. Entering prepares the input and starts nothing; the first request starts the model and
runs it up to that location; leaving lets it finish, or takes it down when the body raised. A trace without an input
collects invokes, and their blocks take part in the run (`joint.py`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from types import FrameType, MethodType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from nnsight._frames import hide
from nnsight._words import Misspelt
from nnsight.errors import InvokeError, NotInTreeError, TracerStateError
from nnsight.kernel import ambient
from nnsight.kernel.blocks import close_block, find, open_block, require, wrong_thread
from nnsight.kernel.controller import current_run
from nnsight.kernel.interleaver import Interleaver
from nnsight.kernel.mediator import Mediator, StopBlock
from nnsight.plugins import hooks

if TYPE_CHECKING:
    from nnsight.joint.invoker import Invoker
    from nnsight.joint.invokes import Invokes
    from nnsight.joint.iteration import Iteration, Steps
    from nnsight.tracing.model import Envoy

_REUSED = (
    "This tracer has been entered already, and a tracer is one run. Call `model.{method}(...)` again for another run."
)
_NOT_ENTERED = (
    "This tracer is not open. `model.{method}(...)` needs its `with`: `with model.{method}(...) as tracer:`, and the "
    "tracer works inside that block."
)
_RUNNING = (
    "Cannot invoke during an active model execution / interleaving: {why}. Use `model.{method}()` with no input and "
    "give every input to a `with tracer.invoke(input):` of its own, before anything is read from the model."
)


class Tracer:
    """One run of a model and the block that takes part in it."""

    _run: Interleaver | None = None
    _mediator: Mediator | None = None
    _frame: FrameType | None = None
    _invokes: Invokes | None = None
    _announced: tuple[Interleaver, ...] = ()

    def __init__(
        self,
        envoy: Envoy,
        method: str,
        function: Callable[..., Any] | str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batched: bool = True,
    ) -> None:
        """Keep what to run.

        Args:
            envoy: what is traced.
            method: the name of the method that opened the trace, for messages and for `prepare`.
            function: runs the model, called with the prepared arguments on the model side; the
                name of a method of the module; None for the module itself.
            args: the user's arguments, not yet prepared.
            kwargs: the user's keyword arguments.
            batched: whether invokes run as one batch, or one after another.
        """
        self._envoy: Envoy | None = envoy
        self._method = method
        self._function = function
        self._args, self._kwargs = args, kwargs
        self._batched = batched

    def __enter__(self) -> Self:
        run: Interleaver | None = None
        mediator: Mediator | None = None
        try:
            envoy = self._envoy
            if envoy is None or self._run is not None:
                raise TracerStateError(_REUSED.format(method=self._method))
            frame = sys._getframe(1)
            root = envoy._traced_root()
            inputs = envoy._prepare(root, self._method, self._args, self._kwargs)
            # Not before: preparing may load the weights, and with them the module.
            function = envoy._module if self._function is None else self._function
            if isinstance(function, str):
                function = getattr(envoy._module, function)
            if inputs.rows is None:
                from nnsight.joint.invokes import Invokes  # lazy: a trace with an input needs nothing of it

                self._invokes = Invokes(envoy, self._method, function, self._batched)
                self._invokes.owner = self
                function = self._invokes.run
            run = self._run = self._make_run(root, function)
            run.args, run.kwargs = inputs.args, inputs.kwargs
            assert run.carrier is not None
            self._frame = frame
            mediator = self._mediator = Mediator(run, run.carrier.resume, run.hand_back, order=sys.maxsize)
            mediator.owner, mediator.frame, mediator.position = self, frame, frame.f_lasti
            open_block(frame, mediator)
            if hooks.trace_opened:
                hooks.trace_opened(self)
        except BaseException as error:
            if mediator is not None and run is not None:  # there will be no `__exit__`
                self._end(run, mediator, error)
            hide(error)
            raise
        return self

    def _announce(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model, after telling plugins."""
        run = current_run.get()
        assert run is not None
        self._announced = (*self._announced, run)
        if hooks.run_started:
            hooks.run_started(run)
        return function(*args, **kwargs)

    def _make_run(self, root: Envoy, function: Callable[..., Any]) -> Interleaver:
        """Prepare a run with the model's edits in it."""
        if hooks.run_started or hooks.run_ended:
            function = partial(self._announce, function)
        run = Interleaver(root._instrumentation, root._module, function, copy_context(), ambient.probe())
        if root.edits:
            first = -len(root.edits)
            run.mediators = [edit.again().join(run, first + i) for i, edit in enumerate(root.edits)]
            if root is not self._envoy:  # a part of the model may not reach what the edits are about
                for mediator in run.mediators:
                    mediator.may_miss = True  # type: ignore[attr-defined]
        return run

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
                    self._finish(run)
                    return False
                hide(error)
                run.unwind()
                if self._invokes is not None:
                    self._invokes.write_back()
                is_stop = isinstance(error, StopBlock) and error.mediator is mediator
                if is_stop:
                    error = None
                return is_stop
            except BaseException as raised:
                error = raised
                run.unwind()  # an interrupt in ours may come while the model stands somewhere
                hide(error)
                raise
            finally:
                try:
                    self._end(run, mediator, error)
                except KeyboardInterrupt:  # in ours: nothing must remain all the same
                    self._end(run, mediator, error)
                    raise
                del error

    def _finish(self, run: Interleaver) -> None:
        """Let the model run to its end, and raise what went wrong in it or in a captured block."""
        invokes = self._invokes
        if invokes is not None and not self._batched and run.is_new:
            invokes.run_apart(self._make_run, run, self._tell_ended)
            return
        run.finish()
        if invokes is not None:
            invokes.write_back()
        if run.has_failed:
            run.raise_error(again=False)

    def _leave_to_its_thread(self, run: Interleaver, mediator: Mediator) -> None:
        """Close a block from a thread that is not its own, and say so."""
        failure = wrong_thread("The end of a block", mediator)
        run.abandon()
        self._end(run, mediator, failure)
        raise failure

    def _end(self, run: Interleaver, mediator: Mediator, error: BaseException | None) -> None:
        """Refer to nothing any more."""
        assert self._frame is not None
        close_block(self._frame, mediator)
        mediator.close()
        run.close()
        if self._invokes is not None:
            self._invokes.close()
        self._run = self._mediator = self._frame = self._envoy = self._function = self._invokes = None
        self._args, self._kwargs = (), {}
        if self._announced:
            self._tell_ended(error)

    def _tell_ended(self, error: BaseException | None) -> None:
        """Tell plugins of the runs that are over."""
        announced, self._announced = self._announced, ()
        for ended in announced:
            if hooks.run_ended:
                hooks.run_ended(ended, error)

    def invoke(self, *args: Any, **kwargs: Any) -> Invoker:
        """Add one input to the batch, with a block of its own: `with tracer.invoke(x):`.

        Args:
            *args: the input, as the model class takes it; none at all for a block that sees the whole batch.
            **kwargs: for the traced call, together with the input.

        Raises:
            InvokeError: the trace has an input of its own, or its run has begun.
        """
        run = self._run
        if run is None:
            raise TracerStateError(_NOT_ENTERED.format(method=self._method))
        if current_run.get() is run or not run.is_new:
            raise InvokeError(_RUNNING.format(why="the run of this trace has begun", method=self._method))
        if self._invokes is None:
            raise InvokeError(_RUNNING.format(why="this trace was given an input of its own", method=self._method))
        return self._invokes.add(args, kwargs)

    @property
    def result(self) -> Any:
        """What the traced call returns: the model's output, or the generated ids. Ends the run when read."""
        mediator = self._current("result")
        assert mediator.tree is not None
        try:
            return mediator.read(mediator.tree.result)
        except AttributeError as error:
            self.__dict__["_kept_error"] = error  # else Python would ask `__getattr__`, which hides it
            raise

    def stop(self) -> None:
        """End the block here and the run with it; what follows in the block is not run."""
        self._current("stop").stop()

    @property
    def iter(self) -> Steps:
        """The steps of the run: `for step in tracer.iter[:3]:`, `[2]`, `[[0, 4]]`, `[::2]`."""
        from nnsight.joint.iteration import Steps  # lazy: most traces have no steps

        return Steps(self.current_block, self._first_input())

    def all(self) -> Iteration:
        """Every step of the run, as `tracer.iter[:]`."""
        return self.iter[:]

    def next(self, step: int = 1) -> Self:
        """Let the requests that follow mean a later step.

        Args:
            step: how many steps later, 1 or more.
        """
        self.current_block().advance(step)
        return self

    def current_block(self) -> Mediator:
        """Return the block of this run that the calling code is in, for plugins.

        Raises:
            TracerStateError: the tracer is not open.
        """
        return self._current("block")

    @property
    def envoy(self) -> Envoy:
        """What is traced, the model or a part of it, for plugins.

        Raises:
            TracerStateError: the tracer is not open.
        """
        if self._envoy is None or self._run is None:
            raise TracerStateError(_NOT_ENTERED.format(method=self._method))
        return self._envoy

    def _first_input(self) -> int:
        assert self._envoy is not None
        return self._envoy._number

    def _current(self, port: str) -> Mediator:
        """Return the block of this run that the calling code is in."""
        run, mediator = self._run, self._mediator
        if run is None or mediator is None or run.tree is None:
            raise TracerStateError(_NOT_ENTERED.format(method=self._method))
        return find(run.tree, of_tracer=self) or require(run.tree, "tracer", port)

    def __getattr__(self, name: str) -> Any:
        kept = self.__dict__.pop("_kept_error", None)
        if kept is not None and name == "result":
            raise kept
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        from nnsight import plugins  # lazy: a name that only a plugin may provide

        function = plugins.lookup("nnsight.tracer", name)
        if function is None:
            told = f"A tracer has no {name!r}, and no installed plugin provides it."
            raise NotInTreeError(Misspelt(told, name, self))
        return MethodType(function, self)

    def __dir__(self) -> list[str]:
        from nnsight import plugins  # lazy: as above

        return sorted({*super().__dir__(), *plugins.names("nnsight.tracer")})
