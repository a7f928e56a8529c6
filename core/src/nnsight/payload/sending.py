"""A run as data: what is traced, with what, the block, and the edits that take part. And the run made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from nnsight.capture.cells import Scope
from nnsight.errors import PayloadError
from nnsight.payload.blocks import SentBlock, pack_block
from nnsight.payload.defining import Definitions
from nnsight.payload.describing import Descriptions
from nnsight.payload.outside import Outside
from nnsight.payload.packing import Packer
from nnsight.payload.tensors import Put
from nnsight.payload.unpacking import Unpacker
from nnsight.payload.views import Get, Views

#: Functions and classes that were sent, by what the payload calls them.
Own = dict[tuple[str, int], Any]


def pack_blocks(
    root: Any, scopes: Iterable[Scope], put: Put, own: Own | None = None,
    tell: Callable[[Outside], None] | None = None, **values: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return blocks, and values that belong to them, as JSON has them.

    Args:
        root: the model.
        scopes: the blocks, each with its variables.
        put: lays down the bytes of tensors, a flat tensor that most often is a view of them; returns where they are.
        own: is filled with the functions and classes that are sent, for `unpack_values` of what comes back.
        tell: given what the first block finds outside of itself.
        **values: anything that can travel, such as the arguments of a trace. What they share with what the blocks use
            is one object at the other end, too.

    Raises:
        UnsendableError: something in it cannot travel; names it, its type, and what to do.
    """
    packer = Packer(root)
    descriptions = packer.descriptions = Descriptions(packer)
    try:
        scopes = list(scopes)
        blocks = [pack_block(packer, scope) for scope in scopes]
        packed = {name: packer.named(f"One of the {name}", value) for name, value in values.items()}
        definitions = descriptions.finish()
        if own is not None:
            own.update(descriptions.packed())
        if tell is not None:
            tell(descriptions.outside(scopes[0]))
    finally:
        packer.descriptions = None  # else the two would keep the model until they are collected
    return {
        "blocks": blocks, "values": packed, "shared": packer.shared, "definitions": definitions,
        "tensors": packer.tensors.lay(put),
    }  # fmt: skip


class SentBlocks:
    """Blocks that were sent, and values that belong to them. Making them runs code of the sender's.

    Args:
        data: what `pack_blocks` returned.
        get: returns the bytes that were laid down at a place, as a flat tensor that nobody else uses.
        resolve: returns the envoy at a path.
        submodule: returns what stands for the module at a path.
        device: returns the device to use for one that the sender had.
        called: returns what a file of the sender is called here: another name, where there may be one of that name.

    Attributes:
        blocks: the blocks.
        values: the values by name.
        made: returns the functions and classes of the sender, for `pack_values` of what goes back.

    Raises:
        PayloadError: the data is malformed, or refers to what is not to be had here.
    """

    def __init__(
        self, data: Any, get: Get, resolve: Callable[[str], Any], submodule: Callable[[str], Any],
        device: Callable[[str], torch.device] = torch.device, called: Callable[[str], str] = str,
    ) -> None:  # fmt: skip
        match data:
            case {"blocks": list(blocks), "values": dict(values), "shared": shared, "definitions": definitions,
                  "tensors": tensors}:  # fmt: skip
                pass
            case _:
                raise PayloadError("This payload holds no blocks.")
        unpacker = Unpacker(shared, Views(tensors, get), resolve, submodule)
        unpacker.device = device
        unpacker.definitions = Definitions(definitions, unpacker, called)
        self.blocks = [SentBlock(block, unpacker, called) for block in blocks]
        self.values = {name: unpacker.value(value) for name, value in values.items()}
        unpacker.definitions.fill()
        self.made = unpacker.definitions.made
        self.outside = self.blocks[0].outside(unpacker.definitions) if self.blocks else None
        unpacker.definitions = None  # else the two would keep the model until they are collected
