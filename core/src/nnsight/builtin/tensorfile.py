"""Tensors and a text in one safetensors file. Nothing in it is executed, and any program knowing the format reads it.

The format is that of the safetensors library: eight bytes that say how long the header is, a JSON header, the tensors'
bytes.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def can_hold(tensor: torch.Tensor) -> bool:
    """Return whether a tensor can be in such a file: a dense one of a dtype that the format has."""
    return tensor.dtype in _NAMES and tensor.layout is torch.strided and tensor.device.type != "meta"


def write(path: Path, tensors: Mapping[str, torch.Tensor], about: str) -> None:
    """Write a file, which is replaced once the new one is complete.

    Args:
        path: the file; its folder must exist.
        tensors: by name; each as `can_hold` says.
        about: any text.
    """
    header: dict[str, Any] = {"__metadata__": {"nnsight": about}}
    parts: list[bytes] = []
    at = 0
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
        parts.append(flat.view(torch.uint8).numpy().tobytes())
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(parts[-1])],
        }
        at += len(parts[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.writelines(parts)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors, on the CPU, and the text of a file.

    Raises:
        ValueError: it is no such file, or damaged.
    """
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if not 0 < size <= len(content) - 8:
        raise ValueError("it is no safetensors file")
    header = json.loads(content[8 : 8 + size])
    about = header.pop("__metadata__", {}).get("nnsight")
    if not isinstance(about, str):
        raise ValueError("it was not written by nnsight")
    data = content[8 + size :]
    return {name: _tensor(entry, data) for name, entry in header.items()}, about


def _tensor(entry: Mapping[str, Any], data: bytes) -> torch.Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    start, end = entry["data_offsets"]
    if end - start != math.prod(shape) * dtype.itemsize or not 0 <= start <= end <= len(data):
        raise ValueError("a tensor in it is not as long as its shape says")
    if start == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data[start:end]), dtype=torch.uint8).view(dtype).reshape(shape)
