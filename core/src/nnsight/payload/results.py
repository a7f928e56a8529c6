"""What a block has saved, as bytes and back. Reading runs nothing, imports nothing, and calls no class's own methods.

Values arrive as they are here: their tensors with their dtypes, shapes and sharing, objects of classes that this
program has loaded (a model's outputs, dataclasses, enums) or has sent with the block, caches, envoys of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from nnsight.errors import PayloadError
from nnsight.payload import container
from nnsight.payload.packing import Packer
from nnsight.payload.sending import Own, SentBlocks
from nnsight.payload.tensors import Put
from nnsight.payload.tree import envoy_at
from nnsight.payload.unpacking import Unpacker
from nnsight.payload.views import Get, Views


def pack_values(
    values: Mapping[str, Any], put: Put, root: Any = None, sent: SentBlocks | None = None,
    given: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return what was saved as JSON has it.

    Args:
        values: what was saved, by name.
        put: lays down the bytes of tensors, a flat tensor that most often is a view of them; returns where they are.
        root: the model: its envoys travel as paths.
        sent: the block as it was received, for values of the sender's own classes.
        given: returns data by which the other end knows a value already, None for any other.

    Raises:
        UnsendableError: one cannot travel; names it, its type, and what to do.
    """
    packer = Packer(root)
    packer.given = given
    if sent is not None:
        packer.own = sent.made()
    packed = {name: packer.named(f"What was saved as {name!r}", value) for name, value in values.items()}
    return {"values": packed, "shared": packer.shared, "tensors": packer.tensors.lay(put)}


def unpack_values(
    data: Any, get: Get, root: Any = None, own: Own | None = None, given: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """Return what was saved, by name. The data may come from anybody.

    Args:
        data: what `pack_values` returned.
        get: returns the bytes that were laid down at a place, as a flat tensor that nobody else uses.
        root: the model here; None where there is none.
        own: the functions and classes that were sent with the block.
        given: returns the value that data of the other end's `given` stands for.

    Raises:
        PayloadError: the data is malformed, or holds what is no value.
    """
    match data:
        case {"values": dict(values), "shared": shared, "tensors": tensors}:
            pass
        case _:
            raise PayloadError("This payload holds no values.")

    def find(path: str) -> Any:
        if root is None:
            raise LookupError("there is no model")
        return envoy_at(root, path)

    unpacker = Unpacker(shared, Views(tensors, get), find, lambda path: find(path)._module)
    unpacker.root, unpacker.given, unpacker.own = root, given, own or {}
    return {name: unpacker.value(value) for name, value in values.items()}


def write_results(
    values: Mapping[str, Any], root: Any = None, options: dict[str, Any] | None = None, sent: SentBlocks | None = None
) -> Iterator[bytes]:
    """Return an iterator over results as bytes, in parts: large tensors are compressed as they are sent.

    Args:
        values: what was saved, by name. Tensors in it must not change until the last part was taken.
        root: the model: its envoys travel as paths.
        options: anything more that the receiver is told, of JSON's types.
        sent: the block as it was received, for values of the sender's own classes.

    Raises:
        UnsendableError: one cannot travel; names it, its type, and what to do.
    """
    pieces = container.Pieces()
    header = {"kind": "results", **pack_values(values, pieces.put, root, sent)}
    return container.write(header if not options else {**header, "options": options}, pieces)


class Results:
    """Results that were received.

    Args:
        source: the bytes, a binary file, or the parts in which they come.
        root: the model here; None where there is none.
        limit: how many bytes of tensors may be in them.
        own: the functions and classes that were sent with the block, from `write_run`.

    Attributes:
        values: what was saved, by name.
        options: what else the sender says.

    Raises:
        PayloadError: they are damaged, too large, of another version of the format, or hold what is no value.
    """

    def __init__(
        self, source: container.Source, root: Any = None, limit: int = container.LIMIT, own: Own | None = None
    ) -> None:
        header, pieces = container.read(source, limit)
        match header:
            case {"kind": "results", "values": dict(), "shared": _, "tensors": _}:
                pass
            case {"kind": str(kind)}:
                raise PayloadError(f"This payload is of the kind {kind!r:.40}, and results were expected.")
            case _:
                raise PayloadError("The header of this payload is malformed.")
        self.options = header.get("options", {})
        if type(self.options) is not dict:
            raise PayloadError("The header of this payload is malformed.")

        def get(number: Any) -> torch.Tensor:
            if type(number) is not int or not 0 <= number < len(pieces):
                raise PayloadError("The table of tensors in this payload is malformed.")
            return pieces[number]

        self.values = unpack_values(header, get, root, own)
