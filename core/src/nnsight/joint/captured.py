"""A captured block as a part of a run: a carried job, with the rows of the batch that are its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from nnsight import _words as words
from nnsight._frames import users_line
from nnsight.capture.cells import Scope
from nnsight.errors import MissedProviderError
from nnsight.joint.batching import Batch
from nnsight.joint.containers import snapshot
from nnsight.joint.origins import Stamp, is_changed, stamps
from nnsight.joint.whole import Whole
from nnsight.kernel import ambient
from nnsight.kernel.blocks import adopt_block, clear_hint
from nnsight.kernel.mediator import Mediator, StopBlock
from nnsight.kernel.sides import Unwind, make_carrier
from nnsight.plugins import hooks

if TYPE_CHECKING:
    import torch

    from nnsight.kernel.interleaver import Interleaver

get_ident = threading.get_ident


class CapturedBlock:
    """A body that has been taken out of its frame, with what held where it was entered.

    Args:
        scope: its variables.
        entered: what `as` binds in it.
        what: how messages call it: "invoke", "edit".
    """

    def __init__(self, scope: Scope, entered: object, what: str) -> None:
        self.scope = scope
        self.entered = entered
        self.what = what
        self.context = copy_context()
        self.state = ambient.probe()

    @property
    def where(self) -> str:
        return self.scope.block.where

    def join(self, run: Interleaver, order: int, batch: Batch | None = None) -> CapturedMediator:
        """Take a seat in a run."""
        mediator = CapturedMediator(run, self, order, batch)
        if hooks.block_joined:
            hooks.block_joined(mediator)
        return mediator

    def again(self) -> CapturedBlock:
        """Return the block for one more run, with variables of its own, in the surroundings of the calling code."""
        return CapturedBlock(self.scope.again(), self.entered, self.what)


class CapturedMediator(Mediator):
    """The seat of a captured block. The model drives it.

    Attributes:
        may_miss: whether it just ends where the run does not reach what it asks for.
    """

    __slots__ = ("_assigned", "_last", "_whole", "batch", "block", "body", "carrier", "may_miss")

    def __init__(self, run: Interleaver, block: CapturedBlock, order: int, batch: Batch | None) -> None:
        self.block: CapturedBlock | None = block
        self.batch = batch
        self.may_miss = False
        #: What was read last: location, visit, joint value, the rows of it, and the containers of those as they were.
        self._last: tuple[int, int, Any, Any, Any] | None = None
        self._whole: Whole | None = None
        #: What was assigned at this visit.
        self._assigned: list[Stamp] = []
        self.carrier = make_carrier(self._work, block.context, block.state, is_model=False)
        super().__init__(run, self._pause, self.carrier.resume, order)
        self.body: Callable[[], None] | None = block.scope.function(block.entered, self._wait_for_name)

    @property
    def has_ended(self) -> bool:
        return self.carrier.has_ended

    @property
    def where(self) -> str:
        return f"({self.block.what} at {self.block.where})" if self.block is not None else "(closed)"

    def _pause(self) -> None:
        if self.batch is not None:
            self._hand_in()
        self.carrier.pause()
        if self._whole is not None:
            self._whole.go_on()

    def take_down(self) -> None:
        self.carrier.unwind()
        self.is_done = True

    def close(self) -> None:
        if self.block is not None:
            self.block.scope.is_over = True
        self.block = self.batch = self.body = self._last = self._whole = None
        super().close()

    def _work(self) -> None:
        """Run the block. Everything it raises is kept for the end of the run."""
        body, block = self.body, self.block
        assert body is not None and block is not None
        self.thread = get_ident()
        adopt_block(self)
        try:
            body()
            self._hand_in()
        except Unwind:
            pass
        except StopBlock as stop:
            self.is_stopped = stop.mediator is self
            if not self.is_stopped:
                self.error = stop
        except BaseException as error:  # noqa: BLE001 - raised again at the end of the `with`
            if self.may_miss and type(error) is MissedProviderError:
                return
            error.add_note(f"in the {block.what} opened at {block.where}")
            self.error = error
        finally:
            clear_hint()
            self.is_done = True
            block.scope.is_over = True

    def _wait_for_name(self, sibling: Scope, name: str) -> None:
        self.wait_until(
            lambda: sibling.is_over or sibling.has(name), f"the name {name!r} from the block at {sibling.block.where}"
        )

    # -- rows --------------------------------------------------------------------------------------------------------

    def read(self, number: int) -> Any:
        batch = self.batch
        if batch is None:
            return Mediator.read(self, number)
        run = self._at_rows(number, batch)
        last, visit = self._last, run.counts[number]
        if last is not None and last[0] == number and last[1] == visit and last[2] is run.value:
            return last[3]
        whole: list[torch.Tensor] = []
        view = batch.narrow(run.value, whole)
        if whole:
            self._whole = self._whole or Whole()
            self._whole.add(whole, number)
        self._last = number, visit, run.value, view, snapshot(view)
        return view

    def write(self, number: int, value: Any) -> None:
        batch = self.batch
        run = self.standing_at(number) if batch is None else self._at_rows(number, batch)
        was = run.value
        if batch is None:
            run.value = value
        else:
            if self._assigned:
                self._last = None  # what was assigned before is no part of the joint value
            self._splice(run, number, value)
            # Until the model goes on the location holds what was assigned, as if the block were alone.
            self._last = number, run.counts[number], run.value, value, snapshot(value)
            self._assigned = stamps(value)
        self.edited[number] = users_line(), words.change(was, run.value)

    def edits(self) -> list[tuple[int, str, str]]:
        return [(number, *how) for number, how in self.edited.items()]

    def _splice(self, run: Interleaver, number: int, value: Any) -> None:
        """Put this block's rows into the value that the model stands at."""
        assert self.batch is not None and self.tree is not None
        last = self._last
        seen = None
        if last is not None and last[0] == number and last[2] is run.value:
            seen = last[3] if last[4] is None else last[4]
        visit = (number, run.counts[number])
        run.value = self.batch.splice(run.value, value, seen, visit, str(self.tree[number]))

    def skip(self, number: int, value: Any) -> None:
        run, how = self.standing_at(number), words.skip(value)
        if self.batch is not None:
            assert self.tree is not None
            value = self.batch.skip(value, run.skipped, self.tree[number].path)
        run.skip(number, value)
        self.edited[number] = users_line(), how

    def _at_rows(self, number: int, batch: Batch) -> Interleaver:
        """Wait for a location, and find out what its value has to do with the batch."""
        run, joint = self.run, batch.joint
        if run is not None:
            joint.watch(run, number, run.count(number) if self.step is None else self.step)
        run = self.standing_at(number)
        if joint.without_rows:
            joint.meet(number, run.counts[number] - 1, run.value)
        return run

    def _hand_in(self) -> None:
        """Before the model goes on: pass on what was put into containers, refuse edits that reach other invokes."""
        last, run, assigned = self._last, self.run, self._assigned
        if assigned:
            self._assigned, self._last = [], None
        if last is not None and run is not None:
            number, visit, whole, view, containers = last
            is_there = run.at == number and run.counts[number] == visit and run.value is whole
            if is_there and (containers is not None or any(map(is_changed, assigned))):
                self._splice(run, number, view)
        if self.batch is not None:
            self.batch.carry_edits()
        if self._whole is not None and self.tree is not None:
            self._whole.hand_over(self.tree)
