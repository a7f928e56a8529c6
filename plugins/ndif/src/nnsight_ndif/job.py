"""What a block has saved, as data, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnsight import Cache
from nnsight_ndif.errors import FrameError, NotInRunnerError
from nnsight_ndif.held import Held
from nnsight_ndif.wire import Special


def checked(result: Any, names: Any) -> dict[str, Any]:
    """Return what a block sends as its result, by name.

    Raises:
        FrameError: it is something else.
    """
    if type(result) is not dict or not all(type(name) is str and name in names for name in result):
        raise FrameError("the result of a block is malformed")
    return result


def unpack_result(data: Any, root: Any, unpack: Callable[[Any], Any]) -> Any:
    """Return one value of a result.

    Raises:
        FrameError: it is malformed.
    """
    match data:
        case Special("cache", [bool(has_output), bool(has_inputs), list(records)]):
            made = Cache(root, has_output, has_inputs)
            for record in records:
                match record:
                    case [int(number), int(occurrence), seen] if 0 <= number < len(root._tree):
                        made._records.append((number, occurrence, unpack(seen)))
                    case _:
                        raise FrameError("a cache in the result of a block is malformed")
            return made
    return unpack(data)


def results(bound: dict[str, Any], saved: dict[int, Any], held: Held, theirs: dict[int, int]) -> dict[str, Any]:
    """Return as data what comes back of a block: what its names are bound to, where that was saved."""
    held.begin()
    found = {}
    for name, value in bound.items():
        if id(value) in saved:
            try:
                found[name] = _pack_result(value, held, theirs)
            except NotInRunnerError as error:
                raise NotInRunnerError(f"What the block saved as {name!r} cannot come back: {error}") from None
    return found


def _pack_result(value: Any, held: Held, theirs: dict[int, int]) -> Any:
    if not isinstance(value, Cache):
        return held.pack(value)
    records = [[theirs[number], occurrence, held.pack(seen)] for number, occurrence, seen in value._records]
    return Special("cache", [*value._ports, records])
