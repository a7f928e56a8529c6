"""`for step in tracer.iter[...]:`: which occurrence a block's requests mean, and when a step begins.

A step is one more pass of the run over what the block asks for: the next call of the traced model in a generation, or
the next call of a module that one forward calls several times.
"""

from __future__ import annotations

import itertools
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from nnsight.capture.cells import write_back
from nnsight.errors import InputError, MissedProviderError
from nnsight.joint.invoker import Capture

if TYPE_CHECKING:
    from nnsight.joint.captured import CapturedBlock
    from nnsight.kernel.mediator import Mediator

_FORMS = "Steps are a number, a slice such as `tracer.iter[2:8:2]`, or a list of numbers, counted from 0"


class IterationWarning(UserWarning):
    """A loop asked for more steps than the run made."""


class Steps:
    """What `tracer.iter` is: choose steps by index.

    Args:
        current: returns the block that the calling code is in.
        root: the number of the traced module's input, which every step of a generation reaches.
    """

    def __init__(self, current: Callable[[], Mediator], root: int) -> None:
        self._current = current
        self._root = root

    def __getitem__(self, steps: int | slice | Iterable[int]) -> Iteration:
        return Iteration(self._current, self._root, steps)

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])


class Iteration(Capture):
    """The steps of one loop, as `for step in tracer.iter[...]:` or `with tracer.iter[...] as step:`."""

    what = "loop"

    def __init__(self, current: Callable[[], Mediator], root: int, steps: int | slice | Iterable[int]) -> None:
        self._current = current
        self._root = root
        self._numbers, self._last = _numbers(steps)

    def __iter__(self) -> Iterator[int]:
        frame = sys._getframe(1)
        return self._loop(frame.f_code.co_filename, frame.f_lineno)

    def _loop(self, filename: str, line: int) -> Iterator[int]:
        mediator = self._current()
        outer, depth, first = mediator.step, mediator.loops, mediator.first
        mediator.loops += 1
        mediator.first = -1
        is_first = True
        try:
            for step in self._numbers:
                # The first step is not waited for: what it will ask for is not known, and may be in the pass before.
                if not (_has_passes(mediator) if is_first else self._wait_for(mediator, step)):
                    self._warn(step, filename, line)
                    break
                is_first = False
                mediator.step, mediator.first, mediator.passed = step, -1, step
                yield step
        finally:
            mediator.loops = depth
            if first >= 0 or mediator.step != outer:
                mediator.first = first  # what a loop in a step touches says nothing about when the next step begins
            # After the loop a request means the next visit that has not passed; in a loop around it, that one's step.
            mediator.step = outer if depth else None

    def _wait_for(self, mediator: Mediator, step: int) -> bool:
        """Wait until a step begins; return False when the run ends before."""
        run = mediator.run
        if run is None or run.tree is None or not _has_passes(mediator):
            return False
        ends = run.tree.ends
        wanted = {self._root: step}
        if mediator.first >= 0:
            wanted[mediator.first] = step
        if any(run.count(number) > step for number in wanted):
            return True
        try:
            return mediator.wait({**dict.fromkeys(ends, 0), **wanted}) in wanted
        except MissedProviderError:
            return False

    def _warn(self, step: int, filename: str, line: int) -> None:
        if self._last is not None:
            warnings.warn_explicit(
                f"The run ended before step {step}: this loop goes up to step {self._last}, so it ended early.",
                IterationWarning, filename, line, registry={},
            )  # fmt: skip  # a registry of its own: Python shows a warning once per line, this is one per loop

    def _captured(self, block: CapturedBlock) -> None:
        """Run the body of the block form once per step."""
        scope = block.scope
        try:
            for step in self._loop(scope.block.filename, scope.block.node.lineno):
                scope.function(step, lambda sibling, name: None)()
        finally:
            write_back([scope])
            scope.close()


def _has_passes(mediator: Mediator) -> bool:
    """Return whether the run is still at its passes: not when it is over, or has reached what comes after the last."""
    run = mediator.run
    if run is None or run.is_over or run.tree is None:
        return False
    return not any(run.count(number) for number in run.tree.ends)


def _numbers(steps: int | slice | Iterable[int]) -> tuple[Iterable[int], int | None]:
    """Return the numbers of the steps, and the last of them; None for no end."""
    if isinstance(steps, slice):
        start = 0 if steps.start is None else _checked(steps.start)
        stride = 1 if steps.step is None else _checked(steps.step)
        if stride == 0:
            raise InputError(f"A slice of steps cannot have the step 0. {_FORMS}.")
        if steps.stop is None:
            return itertools.count(start, stride), None
        counted = range(start, _checked(steps.stop), stride)
        return counted, counted[-1] if counted else None
    chosen: list[Any]
    try:
        chosen = [steps] if hasattr(steps, "__index__") else list(steps)
    except TypeError:
        raise InputError(f"{steps!r} is no step. {_FORMS}.") from None
    numbers = [_checked(value) for value in chosen]
    return numbers, max(numbers, default=None)


def _checked(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(f"{value!r} is no step. {_FORMS}.")
    step = operator.index(value)
    if step < 0:
        raise InputError(f"tracer.iter step cannot be negative: {step}. {_FORMS}.")
    return step
