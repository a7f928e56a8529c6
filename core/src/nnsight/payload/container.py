"""The bytes of a payload: a mark and the format's version, then one zstandard frame with a JSON header and tensors.

    NNSP | version (2 bytes) | zstandard frame: header length (4) | header | safetensors part, if there are tensors

Numbers are little-endian. What a length or a shape announces is compared with a limit before anything is allocated, and
the frame is decompressed piece by piece, so a small payload cannot become a large one unnoticed.
"""

from __future__ import annotations

import ctypes
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import torch

from nnsight.errors import PayloadError, UnsendableError

MAGIC = b"NNSP"
#: The version of the format that is written, and the newest that is read.
FORMAT = 1
#: How many bytes of tensors are read unless the caller says otherwise.
LIMIT = 4 << 30

_MAX_HEADER = 16 << 20
_MAX_NODES = 1_000_000
_MAX_JSON_DEPTH = 200
_MAX_TABLE = 4 << 20
_MAX_WINDOW_LOG = 23  # of the compressor: what it looks back on, 8 MB
_CHUNK = 1 << 18
_LEVEL = 1  # tensors get no smaller with more, and take twice as long
_ALIGNMENT = 64

Source = bytes | bytearray | memoryview | BinaryIO | Iterable[bytes]


def zstd() -> Any:
    """Return the zstandard module: part of Python from 3.14 on."""
    if sys.version_info >= (3, 14):
        from compression import zstd as module  # lazy: only payloads need it
    else:
        from backports import zstd as module  # lazy: only payloads need it
    return module


# -- writing


class Pieces(list[torch.Tensor]):
    """The tensors of a payload that is written."""

    def put(self, piece: torch.Tensor) -> int:
        """Take a flat tensor of bytes; return its number."""
        self.append(piece)
        return len(self) - 1


def write(header: Any, pieces: Sequence[torch.Tensor]) -> Iterator[bytes]:
    """Yield the bytes of a payload, in parts.

    Args:
        header: what JSON can hold.
        pieces: flat tensors of bytes on the CPU, not to be changed meanwhile.

    Raises:
        UnsendableError: the header is too large to be read again.
    """
    module = zstd()
    options = {module.CompressionParameter.compression_level: _LEVEL, module.CompressionParameter.checksum_flag: 1}
    compressor = module.ZstdCompressor(options=options)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False)
    encoded = text.encode("utf-8", "surrogatepass")
    nodes = _nodes(encoded)
    if len(encoded) > _MAX_HEADER or nodes > _MAX_NODES:
        raise UnsendableError(
            f"What the block uses takes {len(encoded) / (1 << 20):.1f} MB and {nodes} values without its tensors, and "
            f"{_MAX_HEADER >> 20} MB and {_MAX_NODES} can be sent. Put long lists of numbers into tensors or arrays."
        )
    yield MAGIC + FORMAT.to_bytes(2, "little") + compressor.compress(len(encoded).to_bytes(4, "little") + encoded)
    if pieces:
        yield compressor.compress(_table(pieces, 4 + len(encoded)))
    for piece in pieces:
        flat = _memory(piece)
        for start in range(0, len(flat), _CHUNK):
            part = compressor.compress(flat[start : start + _CHUNK])
            if part:
                yield part
    yield compressor.flush()


def _table(pieces: Sequence[torch.Tensor], before: int) -> bytes:
    """Return the head of the safetensors part, padded so that the first piece is aligned in what is decompressed."""
    table, at = {}, 0
    for number, piece in enumerate(pieces):
        table[str(number)] = {"dtype": "U8", "shape": [len(piece)], "data_offsets": [at, at + len(piece)]}
        at += len(piece)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(before + 8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


# -- reading


def read(source: Source, limit: int = LIMIT) -> tuple[Any, list[torch.Tensor]]:
    """Return the header of a payload and its pieces, flat tensors of bytes. Nothing in it is run.

    Args:
        source: the bytes, a binary file, or the parts in which they come.
        limit: how many bytes of tensors may be in it.

    Raises:
        PayloadError: it is damaged, too large, or of another version of the format.
    """
    stream = _Stream(source)
    header = _parse(stream.take(stream.number(4, _MAX_HEADER, "header")))
    pieces: list[torch.Tensor] = []
    if not stream.is_over():
        table = _sizes(_parse(stream.take(stream.number(8, _MAX_TABLE, "table of tensors"))), limit)
        pieces = [_piece(stream, size) for size in table]
    stream.finish()
    return header, pieces


def _piece(stream: _Stream, size: int) -> torch.Tensor:
    try:
        piece = torch.empty(size, dtype=torch.uint8)
    except RuntimeError:
        raise PayloadError(f"This payload holds a tensor of {size} bytes, for which there is no memory.") from None
    stream.fill(_memory(piece))
    return piece


def _memory(piece: torch.Tensor) -> memoryview:
    """Return a view of the memory of a flat tensor of bytes."""
    size = len(piece)
    return memoryview((ctypes.c_ubyte * size).from_address(piece.data_ptr())).cast("B") if size else memoryview(b"")


def _sizes(table: Any, limit: int) -> list[int]:
    """Return how long each piece is, after checking that they follow one another."""
    sizes: list[int] = []
    at = 0
    for number in range(len(table) if type(table) is dict else -1):
        match table.get(str(number)):
            case {"dtype": "U8", "shape": [int(size)], "data_offsets": [int(start), int(end)]} if size >= 0:
                pass
            case _:
                raise PayloadError("The table of tensors in this payload is malformed.")
        if start != at or end != at + size:
            raise PayloadError("The tensors in this payload are not where their table says.")
        at = end
        if at > limit:
            raise PayloadError(
                f"This payload announces {at} bytes of tensors, and {limit} may be in one. Send less at once."
            )
        sizes.append(size)
    if type(table) is not dict or not sizes:
        raise PayloadError("The table of tensors in this payload is malformed.")
    return sizes


def _parse(data: bytes) -> Any:
    """Return what some JSON says.

    Raises:
        PayloadError: it is none, or is nested too deeply.
    """
    if _nodes(data) > _MAX_NODES:
        raise PayloadError(f"The header of this payload holds more than {_MAX_NODES} values.")
    _check_depth(data)
    try:
        return json.loads(data.decode("utf-8", "surrogatepass"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"The header of this payload is damaged: {error}.") from None


def _nodes(data: bytes) -> int:
    """Return about how many values some JSON holds; a dict takes the memory of four."""
    return data.count(b",") + data.count(b"[") + 4 * data.count(b"{")


def _check_depth(data: bytes) -> None:
    if data.count(b"[") + data.count(b"{") <= _MAX_JSON_DEPTH:
        return
    depth = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > _MAX_JSON_DEPTH:
            raise PayloadError(f"The header of this payload is nested more than {_MAX_JSON_DEPTH} deep.")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON's")


# A string that does not end ends with the data: else each of its quotes would be tried.
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")


class _Stream:
    """What is in the frame of a payload, read from the start to the end."""

    def __init__(self, source: Source) -> None:
        self._parts = _parts(source)
        start = b""
        while len(start) < 6 and (part := next(self._parts, None)) is not None:
            start += part
        _check_start(start)
        module = zstd()
        self._error: type[Exception] = module.ZstdError
        options = {module.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG}
        self._decompressor = module.ZstdDecompressor(options=options)
        self._given: bytes | memoryview = memoryview(start)[6:]
        self._ready = b""

    def _more(self, count: int) -> bytes:
        """Return up to `count` bytes, at least one; nothing at the end of the frame.

        Raises:
            PayloadError: the bytes of the payload come to an end before the frame does.
        """
        decompressor = self._decompressor
        if self._ready:
            ready, self._ready = self._ready[:count], self._ready[count:]
            return ready
        while not decompressor.eof:
            if decompressor.needs_input and not self._given:
                part = next(self._parts, None)
                if part is None:
                    raise PayloadError("This payload is cut off: it ends before its content does.")
                self._given = part
            given, self._given = self._given, b""
            try:
                found: bytes = decompressor.decompress(given, max_length=count)
            except (self._error, EOFError, MemoryError) as error:
                raise PayloadError(f"This payload is damaged: {error}.") from None
            if found:
                return found
        return b""

    def take(self, count: int) -> bytes:
        """Return so many bytes. The caller has compared the number with a limit."""
        found = bytearray()
        while len(found) < count:
            part = self._more(min(count - len(found), _CHUNK))
            if not part:
                raise PayloadError(f"This payload announces {count} bytes and holds {len(found)}.")
            found += part
        return bytes(found)

    def number(self, size: int, limit: int, what: str) -> int:
        """Read how long something is."""
        number = int.from_bytes(self.take(size), "little")
        if number > limit:
            raise PayloadError(f"This payload announces a {what} of {number} bytes, and {limit} may be in one.")
        return number

    def fill(self, place: memoryview) -> None:
        """Read as many bytes as there is place for."""
        at = 0
        while at < len(place):
            part = self._more(min(len(place) - at, _CHUNK))
            if not part:
                raise PayloadError(f"A tensor in this payload has {len(place)} bytes, of which {at} are there.")
            place[at : at + len(part)] = part
            at += len(part)

    def is_over(self) -> bool:
        """Return whether nothing more is in the frame."""
        if not self._ready:
            self._ready = self._more(_CHUNK)
        return not self._ready

    def finish(self) -> None:
        """Check that the payload ends here."""
        if not self.is_over() or self._decompressor.unused_data or self._given or any(self._parts):
            raise PayloadError("This payload has bytes after its end. It is damaged, or two have become one.")


def _check_start(start: bytes) -> None:
    if start[:4] != MAGIC[: len(start)] or not start:
        raise PayloadError("These bytes are no payload of nnsight's.")
    if len(start) < 6:
        raise PayloadError("This payload is cut off: it ends before its content does.")
    version = int.from_bytes(start[4:6], "little")
    if version > FORMAT:
        raise PayloadError(
            f"This payload has format {version}, and this side reads up to {FORMAT}: the sending side is newer. Update "
            "nnsight-core on the receiving side, or send with the version that is installed there."
        )
    if version < 1:
        raise PayloadError(f"This payload has format {version}, which no version of nnsight-core writes.")


def _parts(source: Source) -> Iterator[bytes]:
    """Yield the bytes of a source in parts, none of them empty."""
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    read: Callable[[int], bytes] | None = getattr(source, "read", None)
    parts: Iterable[bytes] = iter(lambda: read(_CHUNK), b"") if read is not None else source
    return (part for part in parts if part)
