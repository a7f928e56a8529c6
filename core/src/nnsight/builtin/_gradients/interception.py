"""`Tensor.grad` while a traced backward is open: requests of its block go there, everything else passes through.

The property stands on `torch.Tensor` only while a block is open anywhere in the process; it looks first whether the
calling thread has one, and then whether the calling code is in it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch

from nnsight.kernel.blocks import find, open_blocks
from nnsight.kernel.location import Tree

if TYPE_CHECKING:
    from nnsight.builtin._gradients.session import Backward

#: What `find` knows the blocks of traced backward passes by.
GRADIENTS = Tree()

_lock = threading.Lock()
_get_ident = threading.get_ident
_open: dict[int, set[Backward]] = {}  # thread -> the blocks that are open in it
_aside: dict[int, frozenset[Backward]] = {}  # thread -> those that were open when a pass began to run in it
_standing: dict[int, int] = {}  # thread -> what torch calls the pass that stands still in it
_ordinary: Any = torch.Tensor.grad

_ENGINE = torch.autograd.graph._engine_run_backward.__code__
current_task: Callable[[], int] = torch._C._current_graph_task_id
plain_get = _ordinary.__get__
plain_set = _ordinary.__set__


def _block() -> Backward | None:
    ident = _get_ident()
    if ident not in _open:
        return None
    block = cast("Backward | None", find(GRADIENTS, 3))
    # A task or thread that the block has started has its context, but the pass is not its own.
    if block is None or block.thread != ident or block in _aside.get(ident, ()):
        return None
    task = current_task()
    is_plain = task not in (-1, _standing.get(ident)) and _is_in_engine(block, sys._getframe(2))
    return None if is_plain else block


def _is_in_engine(block: Backward, frame: FrameType | None) -> bool:
    """Return whether a frame is in a plain backward pass that the block runs: torch or a hook asks there, not it."""
    while frame is not None and block not in open_blocks.get(frame, ()):
        if frame.f_code is _ENGINE:
            return True
        frame = frame.f_back
    return False


def _get(tensor: torch.Tensor) -> Any:
    block = _block()
    return plain_get(tensor) if block is None else block.read(tensor)


def _set(tensor: torch.Tensor, value: Any) -> None:
    block = _block()
    if block is None:
        plain_set(tensor, value)
    else:
        block.write(tensor, value)


def _delete(tensor: torch.Tensor) -> None:
    _ordinary.__delete__(tensor)


_intercepted = property(_get, _set, _delete, _ordinary.__doc__)


def step_aside(thread: int) -> None:
    """Say that a pass runs in this thread: blocks that are open now have no part in what it does."""
    _aside[thread] = frozenset(_open.get(thread, ()))


def come_back(thread: int, standing: int | None) -> None:
    """Say that the pass has ended, or stands still and is called so by torch."""
    _aside.pop(thread, None)
    if standing is None:
        _standing.pop(thread, None)
    else:
        _standing[thread] = standing


def begin(block: Backward) -> None:
    """Note one more open block; put the property in place for the first in the process."""
    with _lock:
        _open.setdefault(block.thread, set()).add(block)
        if "grad" not in torch.Tensor.__dict__:
            torch.Tensor.grad = _intercepted  # type: ignore[assignment]


def end(block: Backward) -> None:
    """Forget an open block, if it is one; take the property away with the last."""
    with _lock:
        blocks = _open.get(block.thread, set())
        blocks.discard(block)
        if not blocks:
            _open.pop(block.thread, None)
        if not _open and "grad" in torch.Tensor.__dict__:
            del torch.Tensor.grad
