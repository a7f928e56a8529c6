"""Memory that two processes share for the values that cross, one window for each direction.

The model's process makes both. Their size is sealed, so no other end can pull memory away under a reader (which would
kill it), and it fills only as it is used. A message's values are laid one after another from the start; the reader
copies them out before it answers, so the next message starts from the beginning again. What is read was copied first
and is checked then: the other end may go on writing.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os

import torch

from nnsight_ndif.errors import FrameError

_ALIGNMENT = 64
_F_ADD_SEALS, _SEAL, _SHRINK, _GROW = 1033, 0x1, 0x2, 0x4
_MAX_DIMENSIONS = 64

#: The dtypes that may cross, by name.
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "int64", "int32", "int16", "int8",
        "uint8", "uint16", "uint32", "uint64", "bool", "float8_e4m3fn", "float8_e5m2",
    )
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def make(size: int) -> int:
    """Return the descriptor of a new window, sealed to its size."""
    descriptor = os.memfd_create("nnsight-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, _F_ADD_SEALS, _SHRINK | _GROW | _SEAL)
    return descriptor


class Window:
    """One direction.

    Args:
        descriptor: what `make` returned, or a copy of it; it is not needed afterwards.
    """

    def __init__(self, descriptor: int) -> None:
        self.size = os.fstat(descriptor).st_size
        self._memory = mmap.mmap(descriptor, self.size)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._used = 0
        self._taken = 0

    def begin(self) -> None:
        """Start the next message, to be written or read."""
        self._used = self._taken = 0

    def put(self, tensor: torch.Tensor) -> list[object]:
        """Lay down a tensor; return what `get` needs to find it.

        Raises:
            FrameError: there is no room for it, or it is of a kind that cannot cross.
        """
        name = _NAMES.get(tensor.dtype)
        if name is None or tensor.layout is not torch.strided:
            raise FrameError(f"a {tensor.layout} tensor of {tensor.dtype} cannot be sent")
        count = tensor.numel() * tensor.element_size()
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + count > self.size:
            raise FrameError(
                f"a tensor of shape {tuple(tensor.shape)} takes {count} bytes, and of {self.size} that may cross at "
                f"once {self.size - start} are left. Ask for less at once, or give the runner a larger window."
            )
        if count:
            place = self._bytes[start : start + count].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor.detach())
        self._used = start + count
        return [name, list(tensor.shape), start]

    def get(self, place: object) -> torch.Tensor:
        """Return a copy of what `put` has laid down, on the CPU.

        Raises:
            FrameError: it is not within the window, or no tensor.
        """
        match place:
            case [str(name), list(shape), int(start)] if name in DTYPES and len(shape) <= _MAX_DIMENSIONS:
                pass
            case _:
                raise FrameError("a tensor in a message is not described as one")
        if not all(type(size) is int and 0 <= size < 1 << 48 for size in shape) or type(start) is not int:
            raise FrameError(f"a tensor in a message has the shape {shape}")
        dtype = DTYPES[name]
        count = math.prod(shape) * dtype.itemsize
        if start < 0 or start % _ALIGNMENT or count > self.size or start + count > self.size:
            raise FrameError(f"a tensor of shape {shape} in a message is not within what was sent")
        self._taken += count
        if self._taken > self.size:
            raise FrameError("the tensors of a message take more memory than what was sent")
        new = torch.empty(shape, dtype=dtype)
        if count:
            new.view(-1).view(torch.uint8).copy_(self._bytes[start : start + count])
            if dtype is torch.bool:
                new = new.view(torch.uint8) != 0  # any other byte is no bool, and operations on it are undefined
        return new

    def close(self) -> None:
        """Let go of the memory."""
        del self._bytes
        self._memory.close()
