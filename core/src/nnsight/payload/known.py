"""Small values of Python's library, numpy and torch that a few numbers or a text stand for."""

from __future__ import annotations

import datetime as dt
import decimal
import fractions
import operator
import pathlib
import sys
import uuid
from collections.abc import Callable
from typing import Any

import torch

from nnsight.payload.tensors import is_plain


def known_data(value: Any) -> list[Any] | None:
    """Return the data that stands for a value, of JSON's own types; None where it is of another kind."""
    pack = _PACK.get(type(value))
    if pack is not None:
        data: list[Any] | None = pack(value)
        return data
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.dtype) and is_plain(value.str):
        return ["numpy_dtype", value.str]
    return None


def known_value(data: list[Any]) -> Any:
    """Return the value that some data stands for.

    Raises:
        ValueError, TypeError, ArithmeticError: it stands for none.
    """
    make, types = _MAKE[data[0]]
    if len(data) < 2 or not all(type(item) in types for item in data[1:]):
        raise TypeError(f"it is not made of {' and '.join(kind.__name__ for kind in types)}")
    return make(*data[1:])


def _zoned(kind: str) -> Callable[[Any], list[Any] | None]:
    """Return a function that packs a time, if its zone is an offset."""
    return lambda value: [kind, value.isoformat()] if type(value.tzinfo) in _ZONES else None


def _getter(kind: str) -> Callable[[Any], list[Any] | None]:
    """Return a function that packs what `operator` makes, if it looks for names and numbers."""

    def pack(value: Any) -> list[Any] | None:
        names = value.__reduce__()[1]
        return [kind, *names] if all(type(name) in (int, str) for name in names) else None

    return pack


def _numpy_dtype(name: str) -> Any:
    import numpy as np  # lazy: only where the other end had it

    if not is_plain(name):
        raise ValueError(f"numpy has no {name!r}")
    return np.dtype(name)


def _limits(kind: Any, name: str) -> Any:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no {name!r}")
    return kind(dtype)


_ZONES = (type(None), dt.timezone)
_PACK: dict[type, Callable[[Any], Any]] = {
    dt.date: lambda value: ["date", value.isoformat()],
    dt.datetime: _zoned("datetime"),
    dt.time: _zoned("time"),
    dt.timedelta: lambda value: ["timedelta", value.days, value.seconds, value.microseconds],
    decimal.Decimal: lambda value: ["decimal", str(value)],
    fractions.Fraction: lambda value: ["fraction", value.numerator, value.denominator],
    uuid.UUID: lambda value: ["uuid", value.hex],
    type(pathlib.Path()): lambda value: ["path", str(value)],
    operator.itemgetter: _getter("itemgetter"),
    operator.attrgetter: _getter("attrgetter"),
    torch.finfo: lambda value: ["finfo", value.dtype],
    torch.iinfo: lambda value: ["iinfo", value.dtype],
}
_TEXT, _NUMBERS, _BOTH = (str,), (int,), (int, str)
#: By kind: what makes a value of the data that follows, and the types that may be in it. With others some would take
#: for ever: a fraction of the text "1e999999999".
_MAKE: dict[Any, tuple[Callable[..., Any], tuple[type, ...]]] = {
    "date": (dt.date.fromisoformat, _TEXT), "datetime": (dt.datetime.fromisoformat, _TEXT),
    "time": (dt.time.fromisoformat, _TEXT), "timedelta": (dt.timedelta, _NUMBERS),
    "decimal": (decimal.Decimal, _TEXT), "fraction": (fractions.Fraction, _NUMBERS), "uuid": (uuid.UUID, _TEXT),
    "path": (pathlib.Path, _TEXT), "itemgetter": (operator.itemgetter, _BOTH),
    "attrgetter": (operator.attrgetter, _TEXT), "numpy_dtype": (_numpy_dtype, _TEXT),
    "finfo": (lambda name: _limits(torch.finfo, name), _TEXT),
    "iinfo": (lambda name: _limits(torch.iinfo, name), _TEXT),
}  # fmt: skip
KINDS = tuple(_MAKE)
