"""Memory of results that is too large to cross at once: it comes in parts, each copied before the next one is sent.

So a large tensor is in the caller's process once, and may be larger than the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nnsight_ndif.errors import FrameError
from nnsight_ndif.window import Window

_PART = 4 << 20
_ROOM = 8 << 20  # for all that crosses with the result itself


def send(pieces: Sequence[torch.Tensor], window: Window, ask: Callable[[Any], Any]) -> list[int]:
    """Send the large ones among some flat tensors of bytes; return the numbers of the others.

    Args:
        pieces: the tensors.
        window: in which parts are laid down.
        ask: sends a request and waits for the answer.
    """
    others, room, most = [], min(_ROOM, window.size // 4), min(_PART, window.size // 2)
    for number, piece in enumerate(pieces):
        if len(piece) <= room:
            room -= len(piece)
            others.append(number)
        else:
            for start in range(0, len(piece), most):
                ask([number, len(piece), start, piece[start : start + most]])
    return others


class Parts:
    """What has come of such memory. It comes from a runner.

    Args:
        limit: how many bytes there may be.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._pieces: dict[int, torch.Tensor] = {}
        self._filled: dict[int, int] = {}

    def take(self, request: Any, unpack: Callable[[Any], Any]) -> None:
        """Take a part.

        Args:
            request: which piece it is of, how large that is, where the part begins, and the data of the part.
            unpack: returns the tensor that the data stands for.

        Raises:
            FrameError: it is none, is not the next one, or there is too much.
        """
        match request:
            case [int(number), int(size), int(start), data] if size > 0 and start == self._filled.get(number, 0):
                part = unpack(data)
            case _:
                raise FrameError("a part of a result is malformed, or not the next one")
        if type(part) is not torch.Tensor or part.dtype != torch.uint8 or part.dim() != 1 or not len(part):
            raise FrameError("a part of a result is no memory")
        if number not in self._pieces:
            self._left -= size
            if self._left < 0:
                raise FrameError("the results of a block are larger than they may be")
            self._pieces[number] = torch.empty(size, dtype=torch.uint8)
        piece, end = self._pieces[number], start + len(part)
        if size != len(piece) or end > size:
            raise FrameError("a part of a result is larger than what it is a part of")
        piece[start:end] = part
        self._filled[number] = end

    def get(self, number: Any) -> torch.Tensor | None:
        """Return memory that has come in parts, None where this one has not.

        Raises:
            FrameError: some of it is missing.
        """
        piece = self._pieces.get(number) if type(number) is int else None
        if piece is not None and self._filled[number] != len(piece):
            raise FrameError("a part of a result is missing")
        return piece
