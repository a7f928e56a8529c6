"""A cache as a file: safetensors, with what holds the tensors as JSON in its metadata. Nothing in it is executed.

The format is that of the safetensors library: eight bytes that say how long the header is, a JSON header, the tensors'
bytes. Any program that knows it can read the tensors.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nnsight.builtin.cached import Cache
from nnsight.builtin.sizes import readable
from nnsight.errors import CacheFileError, CacheWarning

_FORMAT = 1
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Fields(dict[str, Any]):
    """What came back of an object of some class: its parts, by key, by attribute and by position."""

    kind: str

    def __init__(self, kind: str, parts: dict[str, Any]) -> None:
        super().__init__(parts)
        self.__dict__["kind"] = kind

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this {self.kind} has no {name!r}") from None

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def __repr__(self) -> str:
        return f"{self.kind}({super().__repr__()})"


def write(cache: Cache, file: str | os.PathLike[str]) -> None:
    """Write a cache to a file, which is replaced once the new one is complete.

    Raises:
        CacheFileError: it cannot be written; nothing is left behind.
    """
    path = Path(file)
    packer = _Packer()
    visits = []
    for number, occurrence, value in cache._records:
        where, port = cache._tree[number]
        visits.append([where, port, occurrence, packer.pack(value, f"{where}.{port}:{occurrence}")])
    about = {
        "format": _FORMAT,
        "ports": cache._ports,
        "names": [[parent, name, target] for (parent, name), target in cache._table().items()],
        "visits": visits,
    }
    header: dict[str, Any] = {"__metadata__": {"nnsight.cache": json.dumps(about)}}
    at = 0
    for name, tensor in packer.tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    try:
        _replace(path, json.dumps(header).encode(), list(packer.tensors.values()))
    except OSError as error:
        raise CacheFileError(
            f"The cache ({readable(at)}) cannot be written to {str(path)!r}: {error.strerror or error}. Nothing was "
            "left behind. Choose another place, or keep less: fewer modules, or a smaller dtype."
        ) from error
    if packer.left_out:
        warnings.warn(
            f"{str(path)!r} lacks what cannot be written without pickle: {', '.join(sorted(packer.left_out))}.",
            CacheWarning,
            stacklevel=3,
        )


def read(file: str | os.PathLike[str]) -> Cache:
    """Read a cache from a file.

    Raises:
        CacheFileError: it cannot be read, or is no such file.
    """
    try:
        with open(file, "rb") as stream:
            about, tensors = _read(stream)
    except OSError as error:
        raise CacheFileError(f"No cache can be read from {str(file)!r}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CacheFileError(
            f"No cache can be read from {str(file)!r}: {error}. It is damaged, or not written by `cache.save(file)`."
        ) from error
    cache = Cache(None, *about["ports"])
    cache._given_table = {(parent, name): target for parent, name, target in about["names"]}
    for where, port, occurrence, packed in about["visits"]:
        cache._records.append((cache._tree.number(where, port), occurrence, _unpack(packed, tensors)))
    return cache


class _Packer:
    """Turns values into JSON that refers to tensors by name.

    Attributes:
        tensors: the tensors met, by name.
        left_out: types that could not be expressed.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.left_out: set[str] = set()

    def pack(self, value: Any, name: str) -> Any:
        """Return a value as JSON; its tensors are noted under names that start with `name`."""
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.dtype not in _NAMES:
                self.left_out.add(f"{name} (a tensor of {value.dtype}, {value.layout})")
                return ["left out", "Tensor"]
            self.tensors[name] = value.detach().cpu().contiguous()
            return ["tensor", name]
        if value is None or isinstance(value, bool | int | float | str):
            return ["value", value]
        if isinstance(value, torch.dtype | torch.device):
            return ["value", str(value)]
        if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            return [
                "tuple" if isinstance(value, tuple) else "list",
                [self.pack(item, f"{name}.{i}") for i, item in enumerate(value)],
            ]
        parts = _parts(value)
        if parts is None:
            self.left_out.add(type(value).__name__)
            return ["left out", type(value).__name__]
        packed = [[str(key), self.pack(item, f"{name}.{key}")] for key, item in parts.items()]
        return ["dict", packed] if type(value) is dict else ["fields", type(value).__name__, packed]


def _parts(value: Any) -> dict[Any, Any] | None:
    """Return what an object is made of, None where that cannot be told."""
    if isinstance(value, dict):
        return value
    if hasattr(value, "_asdict"):
        parts: dict[Any, Any] = value._asdict()
        return parts
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, type | torch.nn.Module) or callable(value):
        return None
    return getattr(value, "__dict__", None)


def _unpack(packed: Any, tensors: dict[str, torch.Tensor]) -> Any:
    kind, content = packed[0], packed[1]
    if kind == "tensor":
        return tensors[content]
    if kind in ("tuple", "list"):
        items = [_unpack(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    if kind == "fields":
        return Fields(content, {key: _unpack(item, tensors) for key, item in packed[2]})
    return content if kind == "value" else Fields(f"left out: {content}", {})


def _replace(path: Path, header: bytes, tensors: list[torch.Tensor]) -> None:
    """Write a file beside the one that is meant, and put it in its place when it is complete."""
    header += b" " * (-len(header) % 8)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(len(header).to_bytes(8, "little"))
            stream.write(header)
            for tensor in tensors:
                stream.write(_bytes(tensor))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _bytes(tensor: torch.Tensor) -> Any:
    """Return a view of a tensor's bytes; numpy has no bfloat16, and may not be there."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())) if size else b""


def _read(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return what the metadata says, and the tensors by name.

    Raises:
        ValueError: the file is not what it should be.
    """
    total = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if total < 8 or length > total - 8:
        raise ValueError("it is no safetensors file")
    header = json.loads(stream.read(length))
    text = header.pop("__metadata__", {}).get("nnsight.cache")
    if text is None:
        raise ValueError("it is a safetensors file, but holds no cache")
    about = json.loads(text)
    if about["format"] > _FORMAT:
        raise ValueError(f"it has format {about['format']}, written by a newer version")
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if end > total - 8 - length:
            raise ValueError(f"it ends before {name!r} does: {total} bytes are too few")
        stream.seek(8 + length + begin)
        data = bytearray(stream.read(end - begin))
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        tensors[name] = tensor.reshape(shape)
    return about, tensors
