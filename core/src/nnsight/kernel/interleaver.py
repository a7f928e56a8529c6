"""One run of a model: its visit counts, the blocks that take part, and who is served when.

A run belongs to nobody and is gone after it. The model side passes locations (`visit`); a block that waits for one is
served there: the model stands still, the block goes on from its request until its next, and what it left as the value
is what the model goes on with.
"""

from __future__ import annotations

import sys
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from nnsight.kernel import ambient, causes
from nnsight.kernel.blocks import clear_hint
from nnsight.kernel.controller import Instrumentation, current_run
from nnsight.kernel.mediator import Mediator
from nnsight.kernel.sides import Carrier, ThreadCarrier, Unwind, make_carrier
from nnsight.protocols import Deferred

if TYPE_CHECKING:
    from nnsight.kernel.location import Tree

    #: A block that waits for what other blocks do, whether that is done, and what it is.
    Condition = tuple[Mediator, Callable[[], bool], object]


_NO_KWARGS: Mapping[str, Any] = MappingProxyType({})
_NOTHING: Any = None


class _Everything(dict[int, Any]):
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
        closing: called when the run is closed; plugins take away with these what they put in place for it.
        skipped: a one-tuple with what the module being entered shall return instead of running, or None.
    """

    # Slots, every one set: a visit reads most of them, and a default on the class is slow to find.
    __slots__ = (
        "__weakref__", "_began_in", "_error", "_function", "_instrumentation", "_interrupt", "_is_closing",
        "_is_error_told", "args", "at", "carrier", "closing", "conditions", "counts", "is_held", "is_over",
        "is_running", "kwargs", "mediators", "module", "skipped", "skipped_paths", "thread", "tree", "value", "waiting",
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
        self.kwargs: Mapping[str, Any] = _NO_KWARGS
        self.mediators: Sequence[Mediator] = ()
        self.conditions: Sequence[Condition] = ()
        self.skipped_paths: Sequence[str] = ()
        self.closing: Sequence[Callable[[], None]] = ()
        self.at, self.thread = -1, 0
        self.value: Any = None
        self.skipped: tuple[Any] | None = None
        self.is_running = self.is_over = self.is_held = self._is_error_told = self._is_closing = False
        self._error: BaseException | None = None
        self._interrupt: BaseException | None = None
        self.counts: list[int] = [0] * len(instrumentation.tree.locations)
        self.waiting: dict[int, Mediator | list[Mediator]] = {}
        context.run(_enter_model_side, self)
        self._began_in = state
        self.carrier: Carrier | None = make_carrier(self._run, context, state, is_model=True)
        if isinstance(self.carrier, ThreadCarrier):
            self.carrier.on_interrupt = self._interrupt_model

    # -- the model side ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Run the model. The first thing that happens on the model side, and the last."""
        assert self.carrier is not None and self._function is not None and self.tree is not None
        self.thread = self.carrier.thread
        self.is_running = True
        try:
            if self.mediators:
                self.start_blocks(self.mediators)
            result = self._function(*self.args, **self.kwargs)
            number = self.tree.result
            self.counts[number] += 1
            if number in self.waiting:
                self.serve(number, result)
        except Unwind:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again where the block asked
            self._error = error
            self._is_closing = self._is_closing or not isinstance(error, Exception)  # an interrupt ends every block
            causes.annotate(self, error)
        finally:
            self.is_running, self.is_over = False, True
            self.at, self.value = -1, None
            if self.mediators:
                self._end_blocks()
                # What a block has raised is told before what the model has: it may be what became of that.
                raised = next((m.error for m in self.mediators if m.error is not None), None)
                if raised is not None and (self._error is None or isinstance(self._error, Exception)):
                    self._error, self._is_error_told = raised, False

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
            elif mediator.has_ended:
                mediator.is_done = True
            else:
                mediator.to_block()
                while self._answer_condition():
                    pass

    def _resume(self, mediator: Mediator) -> None:
        """Let a block go on to its next request. One that has raised takes the model down."""
        mediator.to_block()
        while mediator.has_call and mediator.answer_call():
            mediator.to_block()
        if mediator.error is not None:
            raise Unwind

    def _settle(self) -> None:
        """Let blocks go on whose conditions are met; then honour a stop."""
        while self.conditions and self._answer_condition():
            pass
        for mediator in self.mediators:
            if mediator.is_stopped:
                raise Unwind

    def _answer_condition(self) -> bool:
        for entry in self.conditions:
            mediator, is_met, _ = entry
            if is_met():
                self.conditions = [other for other in self.conditions if other is not entry]
                if self.is_running:
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
        # A block may have the model side call a module: then visits nest.
        before, value_before = self.at, self.value
        self.at, self.value = number, value
        entry = self.waiting[number]
        if not isinstance(entry, list) and not self.mediators and not self.conditions and entry.wanted is None:
            # One inline block waits for this alone: what is below, without the loops.
            if self.counts[number] == entry.occurrence + 1:
                del self.waiting[number]
                entry.number = -1
                pause = self.carrier.pause  # type: ignore[union-attr]  # what runs is carried
                pause()
                while entry.has_call and entry.answer_call():
                    pause()
                if number in self.waiting or self.conditions:
                    self._serve_all(number)
        else:
            self._serve_all(number)
        value = self.value
        self.at, self.value = before, value_before
        return value

    def _serve_all(self, number: int) -> None:
        occurrence = self.counts[number] - 1
        while True:
            while (mediator := self._next(number, occurrence)) is not None:
                self._resume(mediator)
            if not self.conditions or not self._answer_condition():
                break
        if self.mediators:
            self._settle()

    def take_skipped(self, number: int) -> Any:
        """Return what the module being entered shall return, and note that its inside will not be reached."""
        assert self.skipped is not None and self.tree is not None
        (value,) = self.skipped
        self.skipped = None
        if isinstance(value, Deferred):
            value = value.resolve()
        self.skipped_paths = [*self.skipped_paths, self.tree[number].path]
        return value

    def _next(self, number: int, occurrence: int) -> Mediator | None:
        """Return the first block that waits for this visit, waiting no more."""
        entry = self.waiting.get(number)
        if entry is None:
            return None
        for mediator in entry if type(entry) is list else (entry,):
            wanted = mediator.occurrence if mediator.wanted is None else mediator.wanted[number]  # type: ignore[union-attr]
            if wanted == occurrence:
                self.withdraw(mediator)  # type: ignore[arg-type]
                mediator.served = number  # type: ignore[union-attr]
                return mediator  # type: ignore[return-value]
        return None

    def _unwind_again(self, value: Any) -> Any:
        """Raise `Unwind` in a model that swallowed it; let its `finally` blocks call modules."""
        interrupt, self._interrupt = self._interrupt, None
        if interrupt is not None:
            raise interrupt
        error = sys.exception()
        while error is not None:
            if isinstance(error, Unwind):
                return value
            error = error.__context__
        raise Unwind

    # -- the block side ------------------------------------------------------------------------------------------

    @property
    def is_new(self) -> bool:
        return not (self.is_running or self.is_over)

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        return "running" if self.is_running else "over" if self.is_over else "not started"

    def start(self) -> None:
        """Put the instrumentation in place; the model starts when a block first hands over."""
        self.is_held = True
        self._instrumentation.acquire(self)

    def enqueue(self, mediator: Mediator, number: int) -> None:
        """Let a block wait for a location, behind those that were written before it."""
        if not self.is_held:
            self.start()
        entry = self.waiting.setdefault(number, mediator)
        if isinstance(entry, list):
            insort(entry, mediator, key=attrgetter("order"))
        elif entry is not mediator:
            self.waiting[number] = sorted((entry, mediator), key=attrgetter("order"))

    def withdraw(self, mediator: Mediator) -> None:
        """Let a block wait for nothing."""
        waiting = self.waiting
        for number in (mediator.number,) if mediator.wanted is None else mediator.wanted:
            entry = waiting.get(number)
            if entry is mediator:
                del waiting[number]
            elif isinstance(entry, list) and mediator in entry:
                entry.remove(mediator)
                if len(entry) == 1:
                    waiting[number] = entry[0]
        mediator.wanted, mediator.number = None, -1

    @property
    def instrumentation(self) -> Instrumentation:
        """The controllers of the tree, for who has to hold them in place longer than the run."""
        return self._instrumentation

    def number_of(self, module: Any) -> int | None:
        """Return the number of a module's input; None where the tree does not have the module (any more)."""
        return self._instrumentation.number_of(module)

    def skip(self, number: int, value: Any) -> None:
        """Note what the module at whose input the model stands shall return."""
        self.skipped = (value,)

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def raise_error(self, again: bool = True) -> None:
        """Raise what the model raised, if it did; with `again` also when a block has been told already."""
        if self._error is not None and (again or not self._is_error_told):
            self._is_error_told = True
            error, context = self._error, self._error.__context__
            try:
                raise error
            finally:
                error.__context__ = context  # not what the block happens to be handling
                del error

    def hand_back(self) -> None:
        """Let the inline block of this run go on. Called by the model."""
        self.carrier.pause()  # type: ignore[union-attr]  # what runs is carried

    def finish(self) -> None:
        """Let the model run to its end. Called by an inline block that asks for nothing more."""
        assert self.carrier is not None
        if not self.is_over:
            if not self.is_held:
                self.start()
            self.carrier.resume()

    def unwind(self) -> None:
        """Take the model down where it stands."""
        self._is_closing = True
        self.waiting = _Everything()
        if self.carrier is not None:
            self.carrier.unwind()

    def _interrupt_model(self, error: BaseException | None) -> BaseException | None:
        """Raise an error in the model, which runs in another thread, at its next visit; return one not yet raised."""
        pending, self._interrupt = self._interrupt, error
        if error is not None:
            self._is_closing, self.waiting = True, _Everything()
        return pending

    def abandon(self) -> None:
        """Take the model down from a thread that is not its own: that thread will do it when it comes by."""
        self._is_closing = True
        self.waiting = _Everything()
        if self.carrier is not None:
            self.carrier.abandon()

    def close(self) -> None:
        """Release the instrumentation and refer to nothing any more."""
        if self.is_held:
            self._instrumentation.release(self)
            self.is_held = False
            ambient.settle(self._began_in)
        closing, self.closing = self.closing, ()
        for leave in closing:
            leave()
        self.is_running, self.is_over = False, True
        self.tree = self.carrier = self._function = self.module = self.value = self.skipped = None
        self._error, self._instrumentation = None, _NOTHING  # a context may outlive the run: it must not keep the model
        self.args, self.kwargs = (), _NO_KWARGS
        for mediator in self.mediators:
            mediator.close()
        self.mediators = self.conditions = ()
        if not self._is_closing:
            self.waiting = {}


def _enter_model_side(run: Interleaver) -> None:
    current_run.set(run)
    clear_hint()
