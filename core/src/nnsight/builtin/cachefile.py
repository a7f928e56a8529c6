"""A cache as a file: safetensors, with what holds the tensors as JSON in its metadata. Nothing in it is executed."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from nnsight.builtin import tensorfile
from nnsight.builtin.cached import Cache
from nnsight.builtin.sizes import readable
from nnsight.errors import CacheFileError, CacheWarning

_FORMAT = 1
_KEY = "nnsight.cache"
_PORTS = ("input", "output")


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
    try:
        tensorfile.write(path, packer.tensors, json.dumps(about), _KEY)
    except OSError as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in packer.tensors.values())
        raise CacheFileError(
            f"The cache ({readable(size)}) cannot be written to {str(path)!r}: {error.strerror or error}. Nothing was "
            "left behind. Choose another place, or keep less: fewer modules, or a smaller dtype."
        ) from error
    if packer.left_out:
        warnings.warn(
            f"{str(path)!r} lacks what cannot be written without pickle: {', '.join(sorted(packer.left_out))}.",
            CacheWarning,
            stacklevel=4,
        )


def read(file: str | os.PathLike[str]) -> Cache:
    """Read a cache from a file.

    Raises:
        CacheFileError: it cannot be read, or is no such file.
    """
    try:
        tensors, text = tensorfile.read(file, _KEY)
        about = json.loads(text)
        if about["format"] != _FORMAT:
            raise ValueError(f"its format is {about['format']}, and this version reads {_FORMAT}")
        return _read(about, tensors)
    except OSError as error:
        raise CacheFileError(f"No cache can be read from {str(file)!r}: {error.strerror or error}.") from error
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise CacheFileError(
            f"No cache can be read from {str(file)!r}: {error}. It is damaged, or not written by `cache.save(file)`."
        ) from error


def _read(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Cache:
    """Return the cache that a file describes; nothing that it says is believed.

    Raises:
        ValueError, KeyError, IndexError, TypeError: it is not what it should be.
    """
    has_output, has_inputs = about["ports"]
    cache = Cache(None, bool(has_output), bool(has_inputs))
    cache._given_table = {(str(parent), str(name)): str(target) for parent, name, target in about["names"]}
    for where, port, occurrence, packed in about["visits"]:
        if not (isinstance(where, str) and port in _PORTS and type(occurrence) is int and occurrence >= 0):
            raise ValueError(f"it lists {where!r}, {port!r}, {occurrence!r} as a visit")
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
            if not tensorfile.can_hold(value):
                self.left_out.add(f"{name} (a tensor of {value.dtype}, {value.layout})")
                return ["left out", "Tensor"]
            self.tensors[name] = value
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
    if not isinstance(packed, list):
        raise ValueError(f"it holds {packed!r} in the place of a value")
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
    if kind == "left out":
        return Fields(f"left out: {content}", {})
    if kind != "value" or not isinstance(content, bool | int | float | str | None):
        raise ValueError(f"it holds a value of the unknown kind {kind!r}")
    return content
