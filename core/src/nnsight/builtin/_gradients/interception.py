"""`Tensor.grad` while a traced backward is open: requests of its block go there, everything else passes through.

The property stands on `torch.Tensor` only while a block is open anywhere in the process; it looks first whether the
calling thread has one, and then whether the calling code is in it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

import torch

from nnsight.kernel.blocks import find
from nnsight.kernel.location import Tree

if TYPE_CHECKING:
    from nnsight.builtin._gradients.session import Backward

#: What `find` knows the blocks of traced backward passes by.
GRADIENTS = Tree()

_lock = threading.Lock()
_get_ident = threading.get_ident
_open: dict[int, set[Backward]] = {}  # thread -> the blocks that are open in it
_ordinary: Any = torch.Tensor.grad

plain_get = _ordinary.__get__
plain_set = _ordinary.__set__


def _block() -> Backward | None:
    if _get_ident() not in _open:
        return None
    block = cast("Backward | None", find(GRADIENTS, 3))
    # A task or thread that the block has started has its context, but the pass is not its own.
    return block if block is not None and block.thread == _get_ident() else None


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
