"""What a block has saved, as bytes and back. Reading runs nothing, imports nothing, and calls no class's own methods.

Values arrive as they are here: their tensors with their dtypes, shapes and sharing, objects of classes that this
program has loaded (a model's outputs, dataclasses, enums), caches, envoys of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nnsight.errors import PayloadError
from nnsight.payload import container
from nnsight.payload.packing import Packer
from nnsight.payload.tree import envoy_at
from nnsight.payload.unpacking import Unpacker
from nnsight.payload.views import Views


def write_results(
    values: Mapping[str, Any], root: Any = None, options: dict[str, Any] | None = None
) -> Iterator[bytes]:
    """Return an iterator over results as bytes, in parts: large tensors are compressed as they are sent.

    Args:
        values: what was saved, by name. Tensors in it must not change until the last part was taken.
        root: the model: its envoys travel as paths.
        options: anything more that the receiver is told, of JSON's types.

    Raises:
        UnsendableError: one cannot travel; names it, its type, and what to do.
    """
    packer = Packer(root)
    packed = {name: packer.named(f"What was saved as {name!r}", value) for name, value in values.items()}
    pieces: list[torch.Tensor] = []

    def put(piece: torch.Tensor) -> int:
        pieces.append(piece)
        return len(pieces) - 1

    tensors = packer.tensors.lay(put)
    header = {"kind": "results", "values": packed, "shared": packer.shared, "tensors": tensors}
    return _written(header if not options else {**header, "options": options}, pieces, packer)


def _written(header: dict[str, Any], pieces: list[torch.Tensor], packer: Packer) -> Iterator[bytes]:
    yield from container.write(header, pieces)
    del packer  # until now: the pieces are views of what it holds


class Results:
    """Results that were received.

    Args:
        source: the bytes, a binary file, or the parts in which they come.
        root: the model here; None where there is none.
        limit: how many bytes of tensors may be in them.

    Attributes:
        values: what was saved, by name.
        options: what else the sender says.

    Raises:
        PayloadError: they are damaged, too large, of another version of the format, or hold what is no value.
    """

    def __init__(self, source: container.Source, root: Any = None, limit: int = container.LIMIT) -> None:
        header, pieces = container.read(source, limit)
        match header:
            case {"kind": "results", "values": dict(values), "shared": shared, "tensors": tensors}:
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

        def find(path: str) -> Any:
            if root is None:
                raise LookupError("there is no model")
            return envoy_at(root, path)

        unpacker = Unpacker(shared, Views(tensors, get), find, lambda path: find(path)._module)
        unpacker.root = root
        self.values = {name: unpacker.value(value) for name, value in values.items()}
