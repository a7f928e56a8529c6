"""What copies stand in the place of: a tensor that the model, or an outer value, may still hold.

An invoke that assigns gives the model a copy of the joint tensor with its rows replaced. For every other invoke the
copy is the tensor itself: alone it would have been. So what such an invoke changes in place in the copy is done to the
tensor as well, for whoever still holds it, such as the residual stream around a block.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from nnsight.joint.containers import transform
from nnsight.joint.tables import storage_of

if TYPE_CHECKING:
    from nnsight.joint.batching import Batch

#: A tensor, its version when it was looked at, and a copy of one that has no versions (made in inference mode).
Stamp = tuple[torch.Tensor, int, torch.Tensor | None]


def stamp(tensor: torch.Tensor) -> Stamp:
    """Return what tells later whether a tensor has been changed in place."""
    return (tensor, 0, tensor.clone()) if tensor.is_inference() else (tensor, tensor._version, None)


def is_changed(stamped: Stamp) -> bool:
    """Return whether a tensor has been changed in place since."""
    tensor, version, before = stamped
    return tensor._version != version if before is None else not torch.equal(tensor, before)


def stamps(value: Any) -> list[Stamp]:
    """Return the stamps of all tensors in a value."""
    found: list[Stamp] = []

    def look(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            found.append(stamp(leaf))
        return leaf

    transform(value, look)
    return found


class _Origin:
    """What one copy stands for. It keeps neither alive."""

    def __init__(self, copy: weakref.ref[torch.Tensor], whole: torch.Tensor) -> None:
        self.copy = copy
        self._base = weakref.ref(whole if whole._base is None else whole._base)
        self._geometry = whole.size(), whole.stride(), whole.storage_offset()
        #: The first rows of the blocks that have replaced theirs.
        self.replaced: set[int] = set()

    @property
    def whole(self) -> torch.Tensor | None:
        base = self._base()
        return base if base is None else base.as_strided(*self._geometry)


class Origins:
    """What the copies of one run stand for, as long as they live."""

    def __init__(self) -> None:
        self._known: dict[int | None, _Origin] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def add(self, copy: torch.Tensor, whole: torch.Tensor) -> None:
        """Note that `copy` goes on in the place of `whole`."""
        key = storage_of(copy)
        self._known[key] = _Origin(weakref.ref(copy, lambda _: self._known.pop(key, None)), whole)

    def replace(self, copy: torch.Tensor, batch: Batch) -> None:
        """Note that a block has replaced its rows in a copy: there it stands for nothing."""
        self._known[storage_of(copy)].replaced.add(batch.start)

    def has(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is (a view of) a copy."""
        return storage_of(tensor) in self._known

    def carry(self, tensor: torch.Tensor, batch: Batch) -> None:
        """Do to what a copy stands for what a block has done in place to its rows in (a view of) the copy."""
        found = self._known.get(storage_of(tensor))
        while found is not None and batch.start not in found.replaced:
            copy, whole = found.copy(), found.whole
            rows = None if copy is None else batch.slice_of(copy)
            if copy is None or whole is None or rows is None:
                return
            whole[rows] = copy[rows]
            found = self._known.get(storage_of(whole))
