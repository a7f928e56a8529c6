"""What comes back of a job: what the block has saved, and what it has changed outside of itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nnsight import PayloadError, UnsendableError, payload
from nnsight_ndif import parts
from nnsight_ndif.changed import Changed
from nnsight_ndif.errors import FrameError, NotInRunnerError
from nnsight_ndif.held import Held
from nnsight_ndif.outside import Watch
from nnsight_ndif.parts import Parts
from nnsight_ndif.report import rebuild
from nnsight_ndif.shown import Shown
from nnsight_ndif.values import PLAIN
from nnsight_ndif.window import Window
from nnsight_ndif.wire import Special

#: What the names of changes begin with: no name of a block does.
_CHANGE = "#"
_MAX_DEPTH = 20


def results(
    bound: dict[str, Any], saved: dict[int, Any], held: Held, window: Window, ask: Callable[[Any], Any], root: Any,
    sent: payload.SentBlocks, watch: Watch,
) -> list[Any]:  # fmt: skip
    """Return as data what comes back of a block: what its names are bound to, where that was saved; and its changes.

    Args:
        bound: what the block's names are bound to.
        saved: what it has marked, by `id`.
        held: what came from the model.
        window: to lay down tensors in.
        ask: sends a part of what is too large for that, and waits until it has arrived.
        root: the stand-in of the model.
        sent: the block as it was received.
        watch: what it found outside of itself.

    Raises:
        NotInRunnerError: a value cannot come back.
    """
    pieces: list[torch.Tensor] = []
    values = {name: value for name, value in bound.items() if _is_saved(value, saved)}
    lost = []

    def given(value: Any) -> Any:
        return held.known(value) or watch.given(value)

    def put(piece: torch.Tensor) -> int:
        pieces.append(piece)
        return len(pieces) - 1

    pack = partial(payload.pack_values, root=root, sent=sent, given=given)
    for number, change in enumerate(list(watch.changes())):  # packing reaches for memory, too
        try:
            pack({"": change}, _nowhere)
            values[f"{_CHANGE}{number}"] = change
        except UnsendableError as error:
            lost.append([change[0], str(error).partition(": ")[2]])
    try:
        data = pack(values, put)
    except UnsendableError as error:
        raise NotInRunnerError(str(error)) from None
    others = parts.send(pieces, window, ask)
    _, edits = held.begin()
    places = {number: window.put(pieces[number]) for number in others}
    return [edits, data, places, watch.paths(), lost]


def _is_saved(value: Any, saved: dict[int, Any], depth: int = 0) -> bool:
    """Return whether a value was marked, or is a container of nothing but what was, and of constants beside it."""
    if id(value) in saved:
        return True
    if type(value) not in (list, tuple, dict) or depth > _MAX_DEPTH:
        return False
    items = [item for item in (value.values() if type(value) is dict else value) if type(item) not in PLAIN]
    return bool(items) and all(_is_saved(item, saved, depth + 1) for item in items)


def _nowhere(piece: torch.Tensor) -> int:
    return 0


class Results:
    """What `results` told of. The data comes from a runner.

    Args:
        data: the data.
        names: the names that the block may bind.
        shown: what the runner was shown of the model.
        window: in which the small tensors lie.
        come: the large ones, which have come in parts.
        root: the model.
        own: the functions and classes that were sent to the runner.
        outside: what the block found outside of itself.

    Attributes:
        bound: what was saved, by name.
        todo: what brings the changes in place.
        lost: what has changed and cannot come back: what it is called, and why it cannot.
        error: what the block has raised after all that.

    Raises:
        FrameError: it is something else.
        InputError: the block has edited what it must not.
    """

    def __init__(
        self, data: Any, names: Any, shown: Shown, window: Window, come: Parts, root: Any, own: payload.Own,
        outside: payload.Outside,
    ) -> None:  # fmt: skip
        match data:
            case [
                edits, {"values": dict(values), **rest}, dict(places), dict(paths), list(lost), raised
            ] if _are_names(values, names):  # fmt: skip
                self.error = None if raised is None else rebuild(raised)
            case _:
                raise FrameError("the result of a block is malformed")
        shown.apply_edits(edits)
        changed = Changed(outside, paths, root)

        def given(data: Any) -> Any:
            if isinstance(data, Special) and data.kind == "outside":
                return changed.find(data.content)
            return shown.unpack(data)

        def get(number: Any) -> torch.Tensor:
            piece = come.get(number)
            if piece is None and (type(number) is not int or number not in places):
                raise FrameError("the result of a block refers to memory that has not come")
            return window.get(places[number]) if piece is None else piece

        try:
            found = payload.unpack_values({"values": values, **rest}, get, root, own, given)
        except PayloadError as error:
            raise FrameError(f"the result of a block is malformed: {error}") from None
        self.bound = {name: value for name, value in found.items() if not name.startswith(_CHANGE)}
        changes = [value for name, value in found.items() if name.startswith(_CHANGE)]
        self.todo: list[Callable[[], None]] = changed.prepare(changes)
        self.lost: list[tuple[str, str]] = changed.named(lost)


def _are_names(values: dict[Any, Any], names: Any) -> bool:
    return all(type(name) is str and (name in names or name.startswith(_CHANGE)) for name in values)
