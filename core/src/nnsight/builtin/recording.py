"""How `nnsight.explain` sees what blocks ask for: their seats get a class that writes down each request.

A seat keeps its slots and gets other methods, so a run that is not recorded runs the code that it always does. Values
are described at once and not kept; tensors are held weakly until the block asks for the next one, to see whether it
changed them in place.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch

from nnsight._frames import users_line
from nnsight._words import CHANGED, describe
from nnsight.builtin._gradients.reasons import name_of
from nnsight.builtin._gradients.session import Backward
from nnsight.builtin.explain import Explanation, Request
from nnsight.joint.captured import CapturedMediator
from nnsight.kernel.blocks import line_at, open_here
from nnsight.kernel.interleaver import Interleaver
from nnsight.kernel.mediator import Mediator, StopBlock
from nnsight.kernel.sides import Unwind

if TYPE_CHECKING:
    from nnsight.tracing.tracer import Tracer


class _Record:
    """What is written down of one run.

    Args:
        explanation: where to.

    Attributes:
        inline: the seat of the inline block.
        served: what a seat was given last, by its `id`: the request, its location, where in the user's code that was,
            and each tensor with its version then.
    """

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation
        self.inline: weakref.ref[Mediator] | None = None
        self.served: dict[int, tuple[Request, int, Any, list[tuple[weakref.ref[torch.Tensor], int]]]] = {}

    def serve(self, seat: Mediator, request: Request, number: int, value: Any) -> None:
        """Describe what a block was given, and remember its tensors for `settle`."""
        _fill(request, value)
        position = request.where if seat.frame is None else seat.frame.f_lasti
        tensors = [(weakref.ref(tensor), tensor._version) for tensor in _tensors(value) if not tensor.is_inference()]
        self.served[id(seat)] = request, number, position, tensors

    def settle(self, seat: Mediator | None) -> None:
        """Note whether a block has changed in place what it was given last. Called before the model goes on."""
        known = self.served.pop(id(seat), None)
        if known is None or seat is None:
            return
        request, number, position, tensors = known
        for reference, version in tensors:
            tensor = reference()
            if tensor is not None and tensor._version != version:
                request.is_edited = True
                seat.edited[number] = position, CHANGED  # so that an error of the model names it, too


_records: weakref.WeakKeyDictionary[Interleaver, _Record] = weakref.WeakKeyDictionary()


class _Note:
    """Writes down one request while it is made; nothing, for a seat whose run is over or not recorded.

    Args:
        seat: who makes it.
        kind: what it is, as `Request` says.
        number: the location asked for; None for what has none, and then `what` says what it is.
        what: as above.
    """

    def __init__(self, seat: Mediator, kind: str, number: int | None, what: str = "") -> None:
        run = seat.run
        self._seat, self._number = seat, number
        self._record = None if run is None or run.tree is None else _records.get(run)
        if self._record is None or run is None or run.tree is None:
            return
        self._record.settle(seat)
        step = None if number is None else seat._step_of(run, number)
        location = what if number is None else str(run.tree[number])
        block = seat.where.strip("()") if isinstance(seat, CapturedMediator) else "block"
        self._began = time.perf_counter()
        at = self._began - self._record.explanation.began
        self._request = Request(kind, location, step, block, users_line(), at)
        self._record.explanation.requests.append(self._request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._record is not None:
            self._request.seconds = time.perf_counter() - self._began
            if isinstance(error, Unwind):
                self._request.got = "no answer: the run ended first"
            elif error is not None and not isinstance(error, StopBlock):
                self._request.error = _first_line(error)

    def served(self, value: Any) -> None:
        """Take the value that a block was given."""
        if self._record is not None and self._number is not None:
            self._record.serve(self._seat, self._request, self._number, value)

    def got(self, value: Any) -> None:
        """Take another value that belongs to the request."""
        if self._record is not None:
            _fill(self._request, value)


class _Recorded(Mediator):
    """The seat of a block that is recorded."""

    __slots__ = ()

    def read(self, number: int) -> Any:
        with _Note(self, "read", number) as note:
            value = super().read(number)
            note.served(value)
        return value

    def write(self, number: int, value: Any) -> None:
        with _Note(self, "write", number) as note:
            note.got(value)
            super().write(number, value)

    def skip(self, number: int, value: Any) -> None:
        with _Note(self, "skip", number) as note:
            note.got(value)
            super().skip(number, value)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _Note(self, "call", None, type(function).__name__) as note:
            value = super().call(function, *args, **kwargs)
            note.got(value)
        return value

    def wait(self, wanted: dict[int, int]) -> int:
        tree = self.tree
        places = [f"{tree[number]} (occurrence {step})" for number, step in wanted.items()] if tree is not None else []
        with _Note(self, "wait", None, " or ".join(places)) as note:
            number = super().wait(wanted)
            note.got(None if tree is None else str(tree[number]))
        return number

    def wait_until(self, is_met: Callable[[], bool], what: object) -> None:
        with _Note(self, "wait", None, str(what)):
            super().wait_until(is_met, what)

    def stop(self) -> None:
        with _Note(self, "stop", None):
            super().stop()


class _Captured(_Recorded, CapturedMediator):
    """The seat of an invoke or an edit that is recorded."""

    __slots__ = ()

    def _hand_in(self) -> None:
        record = None if self.run is None else _records.get(self.run)
        if record is not None:
            record.settle(self)
        super()._hand_in()


class RecordedBackward(Backward):
    """The block of a traced backward pass, whose requests are recorded with those of the block around it."""

    def read(self, tensor: torch.Tensor) -> Any:
        with _of_gradient("read", tensor) as note:
            value = super().read(tensor)
            if note is not None:
                note.got(value)
        return value

    def write(self, tensor: torch.Tensor, value: Any) -> None:
        with _of_gradient("write", tensor) as note:
            if note is not None:
                note.got(value)
            super().write(tensor, value)


def _of_gradient(kind: str, tensor: torch.Tensor) -> _Note | AbstractContextManager[None]:
    """Return the note of a request for a gradient; nothing where no block around it is recorded."""
    seat = next((block for block in open_here() if isinstance(block, _Recorded)), None)
    if seat is None:
        return nullcontext()
    return _Note(seat, kind, None, f"gradient of {name_of(tensor).partition(' (')[0]}")


class _Run(Interleaver):
    """A run whose inline block is recorded."""

    __slots__ = ()

    def finish(self) -> None:
        record = _records.get(self)
        if record is not None and record.inline is not None:
            record.settle(record.inline())
        super().finish()


class Recorder:
    """The plugin that `explain.on()` registers.

    Args:
        keep: given what is recorded when a trace is opened, and again when it has ended.
    """

    def __init__(self, keep: Callable[[Explanation], None]) -> None:
        self._keep = keep
        self._traces: weakref.WeakKeyDictionary[Tracer, Explanation] = weakref.WeakKeyDictionary()

    def nnsight_trace_opened(self, tracer: Tracer) -> None:
        """Record the inline block of a trace."""
        block = tracer.current_block()
        run, frame = block.run, block.frame
        if type(block) is not Mediator or type(run) is not Interleaver or frame is None:
            return  # carried by something else, which records or not
        record = self._record_of(run)
        record.inline = weakref.ref(block)
        explanation = self._traces[tracer] = record.explanation
        explanation.method, explanation.where = tracer._method, line_at(frame.f_code, block.position)
        block.__class__, run.__class__ = _Recorded, _Run
        self._keep(explanation)

    def nnsight_block_joined(self, block: Mediator) -> None:
        """Record an invoke or an edit."""
        if type(block) is CapturedMediator and block.run is not None:
            self._record_of(block.run)
            block.__class__ = _Captured

    def nnsight_run_started(self, run: Interleaver) -> None:
        """Put what the blocks of a run have asked for so far with the rest of their trace."""
        record = _records.get(run)
        owner: Any = next((block.owner for block in run.mediators if block.owner is not None), None)
        whole = self._traces.get(owner) if owner is not None else None
        if record is None or whole is None or whole is record.explanation:
            return
        part, record.explanation = record.explanation, whole  # with batched=False every invoke is a run of its own
        for request in part.requests:
            request.at += part.began - whole.began
        whole.requests += part.requests

    def nnsight_run_ended(self, run: Interleaver, error: BaseException | None) -> None:
        """Note how a run ended."""
        record = _records.pop(run, None)
        if record is None:
            return
        explanation = record.explanation
        explanation.seconds = time.perf_counter() - explanation.began
        explanation.error = "" if error is None else _first_line(error)
        self._keep(explanation)

    def _record_of(self, run: Interleaver) -> _Record:
        return _records.setdefault(run, _Record(Explanation()))


def _fill(request: Request, value: Any) -> None:
    request.got = value if isinstance(value, str) else describe(value)
    if isinstance(value, torch.Tensor):
        request.shape, request.dtype = tuple(value.shape), value.dtype


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).split(chr(10), 1)[0]}"
