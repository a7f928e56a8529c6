"""What a block has saved, as data, and back."""

from __future__ import annotations

from typing import Any

from nnsight import PayloadError, UnsendableError, payload
from nnsight_ndif.errors import FrameError, NotInRunnerError
from nnsight_ndif.held import Held
from nnsight_ndif.shown import Shown
from nnsight_ndif.window import Window


def results(
    bound: dict[str, Any], saved: dict[int, Any], held: Held, window: Window, root: Any, sent: payload.SentBlocks
) -> list[Any]:
    """Return as data what comes back of a block: what its names are bound to, where that was saved.

    Args:
        bound: what the block's names are bound to.
        saved: what it has marked, by `id`.
        held: what came from the model.
        window: to lay down tensors in.
        root: the stand-in of the model.
        sent: the block as it was received.

    Raises:
        NotInRunnerError: a value cannot come back.
    """
    _, edits = held.begin()
    marked = {name: value for name, value in bound.items() if id(value) in saved}
    try:
        return [edits, payload.pack_values(marked, window.put, root, sent, held.known)]
    except UnsendableError as error:
        raise NotInRunnerError(str(error)) from None


def unpack_results(data: Any, names: Any, shown: Shown, window: Window, root: Any, own: payload.Own) -> dict[str, Any]:
    """Return what `results` told of, by name.

    Args:
        data: what comes from a runner.
        names: those that the block may bind.
        shown: what the runner was shown of the model.
        window: in which the tensors lie.
        root: the model.
        own: the functions and classes that were sent to the runner.

    Raises:
        FrameError: it is something else.
        InputError: the block has edited what it must not.
    """
    match data:
        case [edits, {"values": dict(values), **rest}] if all(type(name) is str and name in names for name in values):
            pass
        case _:
            raise FrameError("the result of a block is malformed")
    shown.apply_edits(edits)
    try:
        return payload.unpack_values({"values": values, **rest}, window.get, root, own, shown.unpack)
    except PayloadError as error:
        raise FrameError(f"the result of a block is malformed: {error}") from None
