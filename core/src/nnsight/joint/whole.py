"""What a block was given whole, since its rows are not those of the batch: to be read only."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from nnsight.errors import BatchError
from nnsight.joint.origins import Stamp, is_changed, stamp
from nnsight.kernel.location import Tree


class Whole:
    """What one block was given whole, and whether it has edited any of that in place.

    The model may change these values itself. So they are looked at when the block hands over to it, and anew from when
    the block goes on. Nothing is kept alive; what is made in inference mode, where a copy tells whether it has changed,
    is watched until the block hands over for the first time.
    """

    __slots__ = ("_copied", "_versions")

    def __init__(self) -> None:
        self._versions: list[tuple[weakref.ref[torch.Tensor], int, int]] = []
        self._copied: list[tuple[Stamp, int]] = []

    def add(self, tensors: Sequence[torch.Tensor], number: int) -> None:
        """Take note of what was read at a location."""
        for tensor in tensors:
            if tensor.is_inference():
                self._copied.append((stamp(tensor), number))
            else:
                self._versions.append((weakref.ref(tensor), tensor._version, number))

    def hand_over(self, tree: Tree) -> None:
        """Look whether the block has edited any of them.

        Raises:
            BatchError: it has: that reaches the other invokes.
        """
        for ref, version, number in self._versions:
            tensor = ref()
            if tensor is not None and tensor._version != version:
                self.go_on()  # said once: a block that catches it goes on
                raise _edited(tensor, tree, number)
        copied, self._copied = self._copied, []
        for stamped, number in copied:
            if is_changed(stamped):
                raise _edited(stamped[0], tree, number)

    def go_on(self) -> None:
        """Look from now on at those that still exist."""
        self._versions = [
            (ref, tensor._version, number) for ref, _, number in self._versions if (tensor := ref()) is not None
        ]


def _edited(tensor: torch.Tensor, tree: Tree, number: int) -> BatchError:
    return BatchError(
        f"`{tree[number]}`, of shape {tuple(tensor.shape)}, was edited in place by an invoke, but its rows are not "
        "those of the batch: the edit has reached the other invokes. Clone it before editing, or edit it from an "
        "invoke without input, which has the whole batch."
    )
