"""Which open block a piece of code belongs to: the one whose frame is innermost on the call stack.

Frames decide because they are exact in generators, coroutines and helpers. A ContextVar is only a hint, for tasks that
a block has started: their stack does not lead to it.
"""

from __future__ import annotations

import dis
import inspect
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from traceback import walk_stack
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Protocol

from nnsight.errors import OutsideTraceError, WrongThreadError

if TYPE_CHECKING:
    from nnsight.kernel.location import Tree
    from nnsight.kernel.mediator import Mediator

open_blocks: dict[FrameType, list[Any]] = {}
_hint: ContextVar[Any] = ContextVar("nnsight_block", default=None)


class Block(Protocol):
    """What is open in a frame: a mediator, or something that only lets values be saved."""

    tree: Tree | None
    thread: int
    outer: Any
    position: int  # of the instruction in its frame that entered it

    @property
    def is_open(self) -> bool: ...
    @property
    def where(self) -> str: ...
    def save(self, value: Any) -> None: ...
    def abandon(self) -> None: ...


class PlainBlock:
    """A block without a run, such as a session."""

    tree: Tree | None = None
    outer: Block | None = None

    def __init__(self, frame: FrameType) -> None:
        self.thread = threading.get_ident()
        self.is_open = True
        self.position = frame.f_lasti
        self.where = f"opened at {line_at(frame.f_code, self.position)}"

    def save(self, value: Any) -> None:
        """Do nothing: every value is there afterwards anyway."""

    def close(self) -> None:
        self.is_open = False

    abandon = close


_ENTER = dis.opmap.get("BEFORE_WITH")  # from 3.14 on any call, which says nothing: then nothing is abandoned
_RESUMABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

OUTSIDE = (
    "Cannot return {port} of Envoy `{path}`: no block of this model is open here, so there is no run to take it from. "
    "Read and write values inside a `with model.trace(input):` block, in the code that the block runs."
)


def open_block(frame: FrameType, mediator: Block) -> None:
    """Register a block whose body runs in `frame`."""
    blocks = open_blocks.get(frame)
    if len(open_blocks) > (blocks is not None):
        _abandon_dead(frame)
    if blocks is None:
        open_blocks[frame] = [mediator]
    else:
        blocks.append(mediator)
    mediator.outer = _hint.get()
    _hint.set(mediator)


def _abandon_dead(frame: FrameType) -> None:
    """Close what an interrupt has left open between a body and its `__exit__`: blocks whose frame is gone."""
    ident = threading.get_ident()
    alive = {above for above, _ in walk_stack(frame)}
    for other, kept in list(open_blocks.items()):
        code, blocks = other.f_code, list(kept)  # a copy: another thread may be closing one of its own
        if other in alive or code.co_flags & _RESUMABLE or any(block.thread != ident for block in blocks):
            continue
        if any(code.co_code[block.position] != _ENTER for block in blocks):  # no `with`, but an ExitStack and the like
            continue
        try:
            other.clear()
        except RuntimeError:  # it runs, in another greenlet
            continue
        open_blocks.pop(other, None)  # of no blocks it may be gone: their thread has been here
        for block in reversed(blocks):
            block.abandon()


def line_at(code: CodeType, at: int) -> str:
    """Return the file and line of an instruction."""
    line = next((line for start, end, line in code.co_lines() if start <= at < end), None)
    return f"{code.co_filename}:{code.co_firstlineno if line is None else line}"


def close_block(frame: FrameType, mediator: Block) -> None:
    """Forget a block, wherever it stands among the open ones."""
    blocks = open_blocks.get(frame)
    if blocks is not None and mediator in blocks:
        blocks.remove(mediator)
        if not blocks:
            open_blocks.pop(frame, None)
    if _hint.get() is mediator:
        outer = mediator.outer
        while outer is not None and not outer.is_open:
            outer = outer.outer
        _hint.set(outer)
    mediator.outer = None


def adopt_block(mediator: Mediator) -> None:
    """Make the calling context, and what it starts, belong to a block that has no frame on the caller's stack."""
    mediator.outer = _hint.get()
    _hint.set(mediator)


def clear_hint() -> None:
    """Make the calling context belong to no block."""
    if _hint.get() is not None:
        _hint.set(None)


def open_here() -> Iterator[Block]:
    """Yield the open blocks of the calling code, of whatever model, from the innermost outwards."""
    frame: FrameType | None = sys._getframe(1) if open_blocks else None
    while frame is not None:
        yield from reversed(open_blocks.get(frame, ()))
        frame = frame.f_back
    hint: Any = _hint.get()
    while hint is not None:
        if hint.is_open:
            yield hint
        hint = hint.outer


def innermost() -> Block | None:
    """Return the innermost open block of the calling code."""
    return next(open_here(), None)


def find(tree: Tree, depth: int = 1, of_tracer: object = None) -> Mediator | None:
    """Return the innermost open block whose run is of `tree`.

    Args:
        tree: the locations that are asked for.
        depth: how many frames above to look first.
        of_tracer: only a block that belongs to this tracer.
    """
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        blocks = open_blocks.get(frame)
        if blocks is not None:
            mediator: Mediator
            for mediator in reversed(blocks):
                if mediator.tree is tree and (of_tracer is None or mediator.owner is of_tracer):
                    return mediator
        frame = frame.f_back
    hint: Any = _hint.get()
    while hint is not None:
        if hint.is_open and hint.tree is tree and (of_tracer is None or hint.owner is of_tracer):
            return hint  # type: ignore[no-any-return]
        hint = hint.outer
    return None


def require(tree: Tree, path: str, port: str) -> Mediator:
    """Return the block that a request for a location belongs to.

    Raises:
        WrongThreadError: a block of this model is open, but in another thread.
        OutsideTraceError: none is.
    """
    mediator = find(tree)
    if mediator is not None:
        return mediator
    ident = threading.get_ident()
    for blocks in list(open_blocks.values()):
        for other in blocks:
            if other.tree is tree and other.thread != ident:
                raise wrong_thread(f"`{path}.{port}`", other)
    raise OutsideTraceError(OUTSIDE.format(port=port, path=path))


def wrong_thread(what: str, mediator: Block) -> WrongThreadError:
    """Return the error for a request that came from a thread that is not the block's."""
    return WrongThreadError(
        f"{what} was requested from thread {threading.get_ident()}, but the open block {mediator.where} belongs to "
        f"thread {mediator.thread}. Read values in the block's own thread and hand them over, or open a trace of its "
        "own in each thread: any number of threads may trace one model at once."
    )
