"""Tensors and a text in one safetensors file. Nothing in it is executed, and any program knowing the format reads it.

The format is that of the safetensors library: eight bytes that say how long the header is, a JSON header, the tensors'
bytes.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def can_hold(tensor: torch.Tensor) -> bool:
    """Return whether a tensor can be in such a file: a dense one of a dtype that the format has."""
    return tensor.dtype in _NAMES and tensor.layout is torch.strided and tensor.device.type != "meta"


def write(path: Path, tensors: Mapping[str, torch.Tensor], about: str, key: str = "nnsight") -> None:
    """Write a file, which is replaced once the new one is complete; where that fails nothing is left behind.

    Args:
        path: the file; its folder must exist.
        tensors: by name; each as `can_hold` says.
        about: any text.
        key: the name of the text in the file's metadata, which says what kind of file it is.
    """
    header: dict[str, Any] = {"__metadata__": {key: about}}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = Path(os.path.realpath(path))  # a link stays one
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    if mode is not None and not path.is_file():
        code = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(code, os.strerror(code) if path.is_dir() else "Not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    stream = open(temporary, "xb")  # noqa: SIM115 - closed below; with the permissions of any new file
    try:
        with stream:
            if mode is not None:
                os.chmod(temporary, mode)
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
                stream.write(_bytes(plain))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink()
        raise


def read(path: str | os.PathLike[str], key: str = "nnsight") -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors, on the CPU, and the text of a file.

    Args:
        path: the file.
        key: the name of the text in its metadata.

    Raises:
        ValueError: it is no such file, or damaged.
        OSError: it cannot be read.
    """
    with open(path, "rb") as stream:
        total = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= total - 8:
            raise ValueError("it is no safetensors file")
        header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
        about = metadata.get(key) if isinstance(metadata, dict) else None
        if not isinstance(about, str):
            raise ValueError(f"it is a safetensors file, but has no {key!r} in its metadata")
        return {name: _tensor(name, entry, stream, 8 + length, total) for name, entry in header.items()}, about


def _bytes(tensor: torch.Tensor) -> Any:
    """Return a view of a tensor's bytes; numpy has no bfloat16, and may not be there."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())) if size else b""


def _tensor(name: str, entry: Any, stream: BinaryIO, first: int, total: int) -> torch.Tensor:
    """Return one tensor; its entry in the header is believed in nothing."""
    dtype, shape, begin, end = _described(name, entry)
    if end > total - first:
        raise ValueError(f"it ends before {name!r} does: {total} bytes are too few")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} is not as long as its shape says")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    stream.seek(first + begin)
    return torch.frombuffer(bytearray(stream.read(end - begin)), dtype=torch.uint8).view(dtype).reshape(shape)


def _described(name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    try:
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or begin > end:
            raise ValueError("a number in it cannot be")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"what its header says of {name!r} makes no sense: {error}") from None
    return dtype, shape, begin, end
