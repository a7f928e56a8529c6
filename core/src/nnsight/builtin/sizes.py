"""Values in few words: types, shapes, bytes."""

from __future__ import annotations

from typing import Any


def describe(value: Any) -> str:
    """Return a value in few words: type and shape of tensors, and what holds them."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {describe(item)}' for key, item in value.items())}}}"
    return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__


def size_of(value: Any) -> int:
    """Return how many bytes the tensors in a value take."""
    if hasattr(value, "element_size"):
        return int(value.numel() * value.element_size())
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(size_of, value))
    return sum(map(size_of, getattr(value, "__dict__", {}).values()))


def readable(size: float) -> str:
    """Return a number of bytes as people write it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
