"""Data as bytes: the body of every message between a model and the process that runs a block.

Each value is a tag byte and what it says follows. There is nothing in it but data: what a tag does not say cannot be
expressed, and reading never calls anything of the program's. `Special` carries what the two ends agree on beyond that
(a tensor in shared memory, say). Reading is bounded: by the length of the bytes, and by a depth.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from nnsight_ndif.errors import FrameError

_MAX_DEPTH = 100
_MAX_DIGITS = 4000  # of an integer that does not fit 64 bits
_u32, _i64, _f64 = struct.Struct("<I"), struct.Struct("<q"), struct.Struct("<d")


@dataclass(frozen=True, slots=True)
class Special:
    """A value that is not plain data: which kind, and the data that stands for it."""

    kind: str
    content: Any


def encode(value: Any) -> bytes:
    """Return a value as bytes.

    Raises:
        FrameError: it holds something that is no data, or is nested too deeply.
    """
    out = bytearray()
    _write(value, out, 0)
    return bytes(out)


def decode(data: bytes) -> Any:
    """Return the value that `encode` made bytes of.

    Raises:
        FrameError: the bytes are no such value, or more than one.
    """
    reader = _Reader(data)
    value = reader.read(0)
    if reader.position != len(data):
        raise FrameError(f"a message has {len(data) - reader.position} bytes too many")
    return value


def _write(value: Any, out: bytearray, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise FrameError(f"a value is nested more than {_MAX_DEPTH} deep, or contains itself")
    kind = type(value)
    if value is None:
        out += b"N"
    elif kind is bool:
        out += b"T" if value else b"F"
    elif kind is int:
        _write_int(value, out)
    elif kind is float:
        out += b"f" + _f64.pack(value)
    elif kind is complex:
        out += b"c" + _f64.pack(value.real) + _f64.pack(value.imag)
    elif kind is str:
        _write_bytes(b"s", value.encode("utf-8", "surrogatepass"), out)
    elif kind is bytes:
        _write_bytes(b"b", value, out)
    elif kind in (list, tuple):
        out += (b"l" if kind is list else b"t") + _u32.pack(len(value))
        for item in value:
            _write(item, out, depth + 1)
    elif kind is dict:
        out += b"d" + _u32.pack(len(value))
        for key, item in value.items():
            _write(key, out, depth + 1)
            _write(item, out, depth + 1)
    elif kind is Special:
        _write_bytes(b"x", value.kind.encode(), out)
        _write(value.content, out, depth + 1)
    else:
        raise FrameError(f"a {kind.__qualname__} cannot be sent")


def _write_int(value: int, out: bytearray) -> None:
    if -(1 << 63) <= value < 1 << 63:
        out += b"i" + _i64.pack(value)
    else:
        digits = hex(value).encode()
        if len(digits) > _MAX_DIGITS:
            raise FrameError("an integer is too large to be sent")
        _write_bytes(b"I", digits, out)


def _write_bytes(tag: bytes, data: bytes, out: bytearray) -> None:
    out += tag + _u32.pack(len(data)) + data


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def read(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise FrameError(f"a message is nested more than {_MAX_DEPTH} deep")
        tag = self._take(1)
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag == b"i":
            return _i64.unpack(self._take(8))[0]
        if tag == b"f":
            return _f64.unpack(self._take(8))[0]
        if tag == b"c":
            return complex(_f64.unpack(self._take(8))[0], _f64.unpack(self._take(8))[0])
        if tag in b"ltd":
            return self._container(tag, depth)
        if tag in b"sbIx":
            return self._text(tag, depth)
        raise FrameError(f"a message has the unknown tag {tag!r}")

    def _container(self, tag: bytes, depth: int) -> Any:
        size = self._size(2 if tag == b"d" else 1)
        if tag == b"d":
            try:
                return {self.read(depth + 1): self.read(depth + 1) for _ in range(size)}
            except TypeError:
                raise FrameError("a key of a dict cannot be one") from None
        items = [self.read(depth + 1) for _ in range(size)]
        return items if tag == b"l" else tuple(items)

    def _text(self, tag: bytes, depth: int) -> Any:
        data = self._take(self._size(1))
        try:
            if tag == b"b":
                return data
            if tag == b"s":
                return data.decode("utf-8", "surrogatepass")
            if tag == b"x":
                return Special(data.decode("ascii"), self.read(depth + 1))
            if len(data) > _MAX_DIGITS:
                raise FrameError("an integer in a message is too large")
            return int(data, 16)
        except ValueError as error:
            if isinstance(error, FrameError):
                raise
            raise FrameError(f"a message holds text that is none: {error}") from None

    def _size(self, each: int) -> int:
        """Read a count of things that take at least `each` bytes: more than the rest could hold is a lie."""
        size: int = _u32.unpack(self._take(4))[0]
        if size * each > len(self._data) - self.position:
            raise FrameError(f"a message announces {size} things and is shorter")
        return size

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise FrameError("a message ends too early")
        found = self._data[self.position : end]
        self.position = end
        return found


_CONSTANTS = {b"N": None, b"T": True, b"F": False}
