"""One run of a model: its visit counts, the blocks that take part, and who is served when.

A run belongs to nobody and is gone after it. The model side passes locations (`visit`); a block that waits for one is
served there: the model stands still, the block goes on from its request until its next, and what it left as the value
is what the model goes on with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextvars import Context
from enum import Enum
from typing import TYPE_CHECKING, Any

from nnsight.kernel import ambient
from nnsight.kernel.blocks import clear_hint
from nnsight.kernel.controller import Instrumentation, current_run
from nnsight.kernel.sides import Carrier, Unwind, make_carrier

if TYPE_CHECKING:
    from nnsight.kernel.location import Tree
    from nnsight.kernel.mediator import Mediator


class State(Enum):
    """How far a run is."""

    NEW = "not started"
    RUNNING = "running"
    OVER = "over"


class Deferred:
    """A value that several blocks bring together, known when all have been served."""

    def resolve(self) -> Any:
        """Return the value."""
        raise NotImplementedError


class _Everything(dict[int, list["Mediator"]]):
    """Stands for `waiting` while a run is closing: every visit looks, and is unwound."""

    def __contains__(self, number: object) -> bool:
        return True


class Interleaver:
    """One run.

    Attributes:
        tree: the numbering of its locations; None when the run is over.
        counts: how often each location has been reached, by number.
        waiting: location number -> the mediators parked for it, in the order their blocks were written.
        mediators: the captured blocks of the run, in the order they were written.
        conditions: blocks that wait for something that other blocks do: mediator, whether it is met, what it is.
        at: the location that the model stands at, -1 while it moves; `value` is the value there.
        thread: the thread that the model runs in.
        skipped: a one-tuple with what the module being entered shall return instead of running, or None.
    """

    __slots__ = (
        "_error", "_error_told", "_function", "_instrumentation", "_is_closing", "_is_held", "args", "at",
        "carrier", "conditions", "counts", "kwargs",
        "mediators", "module", "skipped", "skipped_paths", "state", "thread", "tree", "value", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        instrumentation: Instrumentation,
        module: Any,
        function: Callable[..., Any],
        context: Context,
        state: ambient.State,
    ) -> None:
        """Prepare a run; nothing starts.

        Args:
            instrumentation: the controllers of the tree that is run.
            module: the root module of the tree, to explain what was missed.
            function: what runs the model, called with `args` and `kwargs` on the model side.
            context: the contextvars of the model side.
            state: the ambient torch state that the model side starts with.
        """
        self._instrumentation = instrumentation
        self.tree: Tree | None = instrumentation.tree
        self.module = module
        self._function: Callable[..., Any] | None = function
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.counts: list[int] = [0] * len(instrumentation.tree)
        self.waiting: dict[int, list[Mediator]] = {}
        self.mediators: list[Mediator] = []
        self.conditions: list[tuple[Mediator, Callable[[], bool], str]] = []
        self.at = -1
        self.value: Any = None
        self.thread = 0
        self.skipped: tuple[Any] | None = None
        self.skipped_paths: list[str] = []
        self.state = State.NEW
        self._error: BaseException | None = None
        self._error_told = False
        self._is_closing = False
        self._is_held = False
        context.run(_enter_model_side, self)
        self.carrier: Carrier | None = make_carrier(self._run, context, state, is_model=True)

    # -- the model side ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Run the model. The first thing that happens on the model side, and the last."""
        assert self.carrier is not None and self._function is not None and self.tree is not None
        self.thread = self.carrier.thread
        self.state = State.RUNNING
        try:
            if self.mediators:
                self.start_blocks(self.mediators)
            result = self._function(*self.args, **self.kwargs)
            self.visit(self.tree.result, result)
        except Unwind:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again where the block asked
            self._error = error
        finally:
            self.state = State.OVER
            self.at, self.value = -1, None
            if self.mediators:
                self._end_blocks()

    def start_blocks(self, mediators: Sequence[Mediator]) -> None:
        """Run each of these captured blocks up to its first request."""
        for mediator in mediators:
            self._resume(mediator)
        self._settle()

    def _end_blocks(self) -> None:
        """Tell every block that still waits that the run is over, and let it go on to its end."""
        is_taken_down = self._is_closing or any(m.is_stopped or m.error is not None for m in self.mediators)
        self._is_closing = is_taken_down
        while pending := [m for m in self.mediators if not m.is_done]:
            conditional = {id(m) for m, _, _ in self.conditions}
            mediator = next((m for m in pending if id(m) not in conditional), pending[0])
            self.conditions = [entry for entry in self.conditions if entry[0] is not mediator]
            if is_taken_down:
                mediator.take_down()
            else:
                mediator.to_block()
                while self._answer_condition():
                    pass

    def _resume(self, mediator: Mediator) -> None:
        """Let a block go on to its next request. One that has raised takes the model down."""
        mediator.to_block()
        while mediator.answer_call():
            mediator.to_block()
        if mediator.error is not None:
            raise Unwind

    def _settle(self) -> None:
        """Let blocks go on whose conditions are met; then honour a stop."""
        while self.conditions and self._answer_condition():
            pass
        if self.mediators and any(mediator.is_stopped for mediator in self.mediators):
            raise Unwind

    def _answer_condition(self) -> bool:
        for entry in self.conditions:
            mediator, is_met, _ = entry
            if is_met():
                self.conditions.remove(entry)
                if self.state is State.RUNNING:
                    self._resume(mediator)
                else:
                    mediator.to_block()
                return True
        return False

    def count(self, number: int) -> int:
        """Return how often a location has been reached; locations may be numbered while a run is open."""
        counts = self.counts
        if number >= len(counts):
            assert self.tree is not None
            counts.extend([0] * (len(self.tree) - len(counts)))
        return counts[number]

    def visit(self, number: int, value: Any) -> Any:
        """Reach a location with `value`; return the value to go on with."""
        self.counts[number] = self.count(number) + 1
        if number in self.waiting:
            return self.serve(number, value)
        return value

    def serve(self, number: int, value: Any) -> Any:
        """Serve who waits for this visit, until nobody can go on here; return the value to go on with."""
        if self._is_closing:
            return self._unwind_again(value)
        before = self.at, self.value  # a block may have the model side call a module: then visits nest
        self.at, self.value = number, value
        occurrence = self.counts[number] - 1
        try:
            while True:
                while (mediator := self._next(number, occurrence)) is not None:
                    mediator.served = number
                    self._resume(mediator)
                if not self.conditions or not self._answer_condition():
                    break
            if self.mediators:
                self._settle()
            return self.value
        finally:
            self.at, self.value = before

    def take_skipped(self, number: int) -> Any:
        """Return what the module being entered shall return, and note that its inside will not be reached."""
        assert self.skipped is not None and self.tree is not None
        (value,) = self.skipped
        self.skipped = None
        if isinstance(value, Deferred):
            value = value.resolve()
        self.skipped_paths.append(self.tree[number].path)
        return value

    def _next(self, number: int, occurrence: int) -> Mediator | None:
        parked = self.waiting.get(number)
        if parked is not None:
            for mediator in parked:
                if mediator.wanted is not None and mediator.wanted[number] == occurrence:
                    self.withdraw(mediator)
                    return mediator
        return None

    def _unwind_again(self, value: Any) -> Any:
        """Raise `Unwind` in a model that swallowed it; let its `finally` blocks call modules."""
        error = sys.exception()
        while error is not None:
            if isinstance(error, Unwind):
                return value
            error = error.__context__
        raise Unwind

    # -- the block side ------------------------------------------------------------------------------------------

    @property
    def is_new(self) -> bool:
        return self.state is State.NEW

    @property
    def is_running(self) -> bool:
        return self.state is State.RUNNING

    @property
    def is_over(self) -> bool:
        return self.state is State.OVER

    def start(self) -> None:
        """Put the instrumentation in place; the model starts when a block first hands over."""
        self._instrumentation.acquire()
        self._is_held = True

    def enqueue(self, mediator: Mediator) -> None:
        """Let a mediator wait for what it wants."""
        if not self._is_held:
            self.start()
        waiting = self.waiting
        for number in mediator.wanted or ():
            parked = waiting.get(number)
            if parked is None:
                waiting[number] = [mediator]
            else:
                parked.append(mediator)
                parked.sort(key=_order)

    def withdraw(self, mediator: Mediator) -> None:
        """Let a mediator wait for nothing."""
        waiting = self.waiting
        for number in mediator.wanted or ():
            parked = waiting.get(number)
            if parked is not None and mediator in parked:
                if len(parked) == 1:
                    del waiting[number]
                else:
                    parked.remove(mediator)
        mediator.wanted = None

    def skip(self, number: int, value: Any) -> None:
        """Note what the module at whose input the model stands shall return."""
        self.skipped = (value,)

    def raise_error(self, again: bool = True) -> None:
        """Raise what the model raised, if it did.

        Args:
            again: also when a block has been told already.
        """
        if self._error is not None and (again or not self._error_told):
            self._error_told = True
            raise self._error

    def finish(self) -> None:
        """Let the model run to its end. Called by an inline block that asks for nothing more."""
        assert self.carrier is not None
        if not self.is_over:
            if not self._is_held:
                self.start()
            self.carrier.resume()

    def unwind(self) -> None:
        """Take the model down where it stands."""
        self._is_closing = True
        self.waiting = _Everything()
        if self.carrier is not None and self.is_running:
            self.carrier.unwind()

    def abandon(self) -> None:
        """Take the model down from a thread that is not its own: that thread will do it when it comes by."""
        self._is_closing = True
        self.waiting = _Everything()
        if self.carrier is not None and self.is_running:
            self.carrier.abandon()

    def close(self) -> None:
        """Release the instrumentation and refer to nothing any more."""
        if self._is_held:
            self._is_held = False
            self._instrumentation.release()
        self.state = State.OVER
        self.tree = self.carrier = self._function = self.module = self.value = self.skipped = None
        self._error = None
        self.args, self.kwargs = (), {}
        for mediator in self.mediators:
            mediator.close()
        self.mediators, self.conditions = [], []
        if not self._is_closing:
            self.waiting = {}


def _order(mediator: Mediator) -> int:
    return mediator.order


def _enter_model_side(run: Interleaver) -> None:
    current_run.set(run)
    clear_hint()
