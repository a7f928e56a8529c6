"""One block's seat in a run: what the block may ask of the model, as messages.

In the same process a message is a method call. A request is a set of locations with the occurrence wanted of each; the
block then hands over through its seat and goes on when the interleaver has served it, or when the run has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from nnsight import _words as words
from nnsight.errors import InputError, MissedProviderError, OutOfOrderError
from nnsight.kernel import causes
from nnsight.kernel.blocks import line_at, wrong_thread

if TYPE_CHECKING:
    from nnsight.kernel.interleaver import Interleaver
    from nnsight.kernel.location import Tree

_get_ident = threading.get_ident
Handover = Callable[[], None]


class StopBlock(BaseException):
    """Raised in a block by `tracer.stop()`; the `with` of that block swallows it."""

    def __init__(self, mediator: Mediator) -> None:
        super().__init__("the block was stopped")
        self.mediator = mediator


class Mediator:
    """One block's seat in one run.

    Attributes:
        owner: the tracer that the block belongs to.
        run: the run, None once it is over for this block.
        tree: the numbering that locations are meant in.
        to_model: lets the model go on, and returns when it has handed back. Called by the block.
        to_block: lets the block go on, and returns when it has handed back. Called by the model.
        thread: the thread that the block's code runs in.
        step: the occurrence that requests mean; None for the next one not yet passed.
        passed: the last step of a loop over steps, which `next` counts from after it.
        number: the location that the block is parked for, at its `occurrence`; -1 for none.
        wanted: location number -> occurrence, where it is parked for any of several.
        served: the number of the location that it was last served with, -1 for none.
        edited: the locations that the block has assigned, where in its frame that was and what it was, for messages.
        loops: how many loops over steps the block is in.
        first: the first location touched since this was last set to -1.
        is_done: whether a captured block has ended; `error` is what it raised, `is_stopped` whether it stopped the run.
    """

    # Programs catch these through the class.
    OutOfOrderError = OutOfOrderError
    MissedProviderError = MissedProviderError

    # Slots, every one set: a request reads most of them, and a default on the class is slow to find.
    __slots__ = (
        "__weakref__", "_pending_call", "edited", "error", "first", "frame", "has_call", "is_done", "is_stopped",
        "loops", "number", "occurrence", "order", "outer", "owner", "passed", "position", "run", "served", "step",
        "thread", "to_block", "to_model", "tree", "wanted",
    )  # fmt: skip

    def __init__(self, run: Interleaver, to_model: Handover, to_block: Handover, order: int = 0) -> None:
        self.run: Interleaver | None = run
        self.tree: Tree | None = run.tree
        self.to_model = to_model
        self.to_block = to_block
        self.order = order
        self.thread = _get_ident()
        self.step: int | None = 0
        self.passed = self.occurrence = self.loops = self.position = 0
        self.number = self.served = self.first = -1
        self.wanted: dict[int, int] | None = None
        self.edited: dict[int, tuple[Any, str]] = {}
        self.is_done = self.is_stopped = self.has_call = False
        self.error: BaseException | None = None
        self.frame: FrameType | None = None
        self.outer: Any = None
        self.owner: object = None
        self._pending_call: Callable[[], None] | None = None

    @property
    def is_open(self) -> bool:
        return self.run is not None

    @property
    def has_ended(self) -> bool:
        """Whether what carries a captured block has come to its end, by itself or by an interrupt."""
        return False

    @property
    def where(self) -> str:
        """The user's file and line at which the block was opened."""
        frame = self.frame
        return f"opened at {line_at(frame.f_code, self.position)}" if frame is not None else "(closed)"

    def edits(self) -> list[tuple[int, str, str]]:
        """Return the locations that the block has assigned: number, the user's file and line, what it was."""
        code = None if self.frame is None else self.frame.f_code
        return [] if code is None else [(number, line_at(code, at), how) for number, (at, how) in self.edited.items()]

    def read(self, number: int) -> Any:
        """Wait for a location and return its value; at one visit always the same object.

        This is the hot path: every request comes through here, and leaves the run standing at the location.
        """
        run = self.run
        if run is None:
            raise causes.block_is_over(self)
        if self.first < 0:
            self.first = number
        step = self.step
        if step is None or step:
            step = self._step_of(run, number)
        try:
            seen = run.counts[number]
        except IndexError:  # numbered while the run was open
            seen = run.count(number)
        if seen > step:
            if run.at != number or seen != step + 1:
                raise causes.out_of_order(run, number, step)
            if _get_ident() != self.thread:
                raise wrong_thread("A value", self)
            return run.value
        if run.is_over:
            self._not_served(run, {number: step})
        self.number, self.occurrence = number, step
        waiting = run.waiting
        if number in waiting or not run.is_held:
            run.enqueue(self, number)
        else:
            waiting[number] = self
        try:
            self.to_model()
        except BaseException:
            self._withdraw(run)
            raise
        if run.at != number:
            self._not_served(run, {number: step})
        return run.value

    def _step_of(self, run: Interleaver, number: int) -> int:
        """Return the occurrence that a request means."""
        step = self.step
        if step is None:  # the one the model stands at, else the next
            seen = run.count(number)
            return seen - 1 if run.at == number else seen
        # Of the end of a run there is one, at whatever step it is asked for.
        return 0 if run.tree is not None and run.tree.is_end(number) else step

    def write(self, number: int, value: Any) -> None:
        """Replace the value of a location, waiting for it unless the model stands there."""
        Mediator.read(self, number)
        run: Any = self.run
        was, run.value = run.value, value
        try:
            how = words.CHANGED if was.shape == value.shape else words.change(was, value)
        except (AttributeError, RuntimeError):  # what holds tensors; nested ones raise the second
            how = words.change(was, value)
        if self.frame is not None:
            self.edited[number] = self.frame.f_lasti, how

    def skip(self, number: int, value: Any) -> None:
        """Let the module whose input has `number` return `value` without running."""
        self.standing_at(number).skip(number, value)
        if self.frame is not None:
            self.edited[number] = self.frame.f_lasti, words.skip(value)

    def standing_at(self, number: int) -> Interleaver:
        """Wait for a location and return the run, which stands there."""
        Mediator.read(self, number)
        assert self.run is not None
        return self.run

    def wait(self, wanted: dict[int, int]) -> int:
        """Wait until the run reaches any of several locations at its occurrence; return the number of that one."""
        run = self.run
        if run is None:
            raise causes.block_is_over(self)
        if _get_ident() != self.thread:
            raise wrong_thread("A value", self)
        for number, occurrence in wanted.items():
            if run.at == number and run.count(number) == occurrence + 1:
                return number
        self._park(run, wanted)
        return self.served

    def wait_until(self, is_met: Callable[[], bool], what: object) -> None:
        """Wait for something that other blocks of this run do, such as binding a name.

        Args:
            is_met: looked at whenever a block has handed over.
            what: its `str` completes "waits for" in the error, told when it cannot happen any more.

        Raises:
            DeadlockError: the run is over and nobody can do it any more.
        """
        run = self.run
        if run is None:
            raise causes.block_is_over(self)
        if not is_met():
            run.conditions = [*run.conditions, (self, is_met, what)]
            self.to_model()
            if not is_met():
                raise causes.deadlock(run, self, what)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function` on the model side, where the modules it calls are visited like the model's own."""
        run = self.run
        if _get_ident() != self.thread:
            raise wrong_thread("A hooked call", self)
        if run is None or not run.is_running:
            return function(*args, **kwargs)
        reply: list[Any] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                reply.append(function(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 - handed over: it belongs to the block that asked
                causes.annotate(run, error)
                failure.append(error)

        self._pending_call, self.has_call = work, True
        self.to_model()
        if failure:
            raise failure.pop()
        return reply[0]

    def advance(self, count: int) -> None:
        """Let requests mean an occurrence that is `count` later."""
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:  # type: ignore[redundant-expr]
            raise InputError(f"A block can only go on to later steps: `next` takes 1 or more, not {count!r}.")
        self.step = (self.passed if self.step is None else self.step) + count

    def save(self, value: Any) -> None:
        """Mark a value as one that must come back. In the caller's own frame everything does."""

    def stop(self) -> None:
        """End this block here, and the run once its siblings at this visit are served."""
        if _get_ident() != self.thread:
            raise wrong_thread("`tracer.stop`", self)
        raise StopBlock(self)

    def take_down(self) -> None:
        """Unwind a captured block. Called by the model."""
        raise AssertionError("an inline block is not taken down by the model")

    def answer_call(self) -> bool:
        """Run what the block wants run on the model side; False when it asked for nothing. Called by the model."""
        work, self._pending_call, self.has_call = self._pending_call, None, False
        if work is None:
            return False
        work()
        return True

    def abandon(self) -> None:
        """Take the run down: nobody will leave the block any more."""
        run = self.run
        if run is not None:
            run.unwind()
            run.close()
        self.close()

    def close(self) -> None:
        """Refer to nothing any more."""
        self.run = self.tree = self.frame = self.owner = self.wanted = self._pending_call = self.error = None
        self.to_model = self.to_block = _handed_nowhere

    def _park(self, run: Interleaver, wanted: dict[int, int]) -> None:
        """Wait for any of several locations."""
        for number, occurrence in wanted.items():
            if run.count(number) > occurrence:
                raise causes.out_of_order(run, number, occurrence)
        if run.is_over:
            self._not_served(run, wanted)
        self.wanted, self.served = wanted, -1
        for number in wanted:
            run.enqueue(self, number)
        try:
            self.to_model()
        except BaseException:
            self._withdraw(run)
            raise
        if self.served < 0:
            self._not_served(run, wanted)

    def _withdraw(self, run: Interleaver) -> None:
        """Wait no more, after handing over has failed: because of an interrupt, or in a thread that is not ours."""
        if not run.is_over:
            run.withdraw(self)
        if _get_ident() != self.thread:
            raise wrong_thread("A value", self) from None

    def _not_served(self, run: Interleaver, wanted: dict[int, int]) -> None:
        run.withdraw(self)
        run.raise_error()
        if any(other.is_stopped for other in run.mediators):
            raise StopBlock(self)  # another block has stopped the run: what follows is dropped here, too
        raise causes.missed(run, wanted)


def _handed_nowhere() -> None:
    raise AssertionError("a closed block handed over")
