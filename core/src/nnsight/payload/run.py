"""A run as bytes: the model it is for, what is traced and how, the blocks.

Reading runs nothing of the sender's and needs no model. `check` compares the model; `open`, for a process that may run
the sender's code, makes the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from nnsight.capture.cells import Scope
from nnsight.errors import PayloadError
from nnsight.payload import container
from nnsight.payload.sending import Own, SentBlocks, pack_blocks
from nnsight.payload.tensors import Put
from nnsight.payload.tree import check_model, describe_model, envoy_at


def write_run(
    envoy: Any, method: str, arguments: tuple[tuple[Any, ...], dict[str, Any]], scope: Scope,
    options: dict[str, Any] | None = None, own: Own | None = None,
) -> Iterator[bytes]:  # fmt: skip
    """Return an iterator over a run as bytes, in parts. The edits of the model are in it.

    Args:
        envoy: what is traced.
        method: the method that opened the trace: "trace", "generate", "session", ...
        arguments: what it was given: `(args, kwargs)`. Tensors in it, as those that the block uses, must not change
            until the last part was taken.
        scope: the block of its `with`.
        options: anything more that the receiver is told, of JSON's types.
        own: is filled with the functions and classes that are sent, for the `Results` of the run.

    Raises:
        UnsendableError: something in it cannot travel; names it, its type, and what to do.
    """
    root = envoy.root
    pieces = container.Pieces()
    edits = [(edit.path, edit.again().scope) for edit in root.edits]
    sent = pack_blocks(root, [scope, *(block for _, block in edits)], pieces.put, own, arguments=arguments)
    known = [root, *root._envoys.values()]
    names = [[other.path, alias, target.path] for other in known for alias, target in other._aliases.items()]
    header = {
        "kind": "run", "model": describe_model(root), "path": envoy.path, "method": method, "sent": sent,
        "names": names, "edits": [path for path, _ in edits], "options": options,
    }  # fmt: skip
    return container.write({key: value for key, value in header.items() if value}, pieces)


class Run:
    """A run that was received.

    Args:
        source: its bytes, a binary file, or the parts in which they come.
        limit: how many bytes of tensors may be in it.

    Attributes:
        model: what the sender says of the model: `model["key"]` is what it is called.
        path: what is traced.
        method: the method that opened the trace.
        options: what else the sender says.
        names: the names that the sender gave to modules: where each is put, the name, and the path it leads to.
        edits: the paths of the envoys that the edits among the blocks belong to.

    Raises:
        PayloadError: it is damaged, too large, or of another version of the format.
    """

    def __init__(self, source: container.Source, limit: int = container.LIMIT) -> None:
        header, self._pieces = container.read(source, limit)
        match header:
            case {"kind": "run", "model": dict(model), "path": str(path), "method": str(method), "sent": dict(sent)}:
                pass
            case {"kind": str(kind)}:
                raise PayloadError(f"This payload is of the kind {kind!r:.40}, and a run was expected.")
            case _:
                raise PayloadError("The header of this payload is malformed.")
        self.model, self.path, self.method, self._sent = model, path, method, sent
        self.options = _checked(header.get("options", {}), dict)
        self.names = _checked(header.get("names", []), list)
        self.edits = _checked(header.get("edits", []), list)
        if not all(type(at) is str for at in self.edits) or not all(_is_name(name) for name in self.names):
            raise PayloadError("The header of this payload is malformed.")
        if not method.isidentifier():
            raise PayloadError(f"This payload is for a method {method!r:.60}, which is no name.")

    def check(self, root: Any) -> None:
        """Check that the run is for a model.

        Raises:
            PayloadError: its tree is another one; says which side to change.
        """
        check_model(self.model, root)
        for path in (self.path, *self.edits):
            try:
                envoy_at(root, path)
            except LookupError as error:
                raise PayloadError(
                    f"This payload is about `{path:.200}`, which is not in the model here: {error}"
                ) from None

    def laid(self, put: Put) -> dict[str, Any]:
        """Return the blocks as `pack_blocks` does, with the bytes of tensors laid down anew, for another process."""
        places = [put(piece) for piece in self._pieces]
        match self._sent.get("tensors"):
            case [list(numbers), views] if all(type(n) is int and 0 <= n < len(places) for n in numbers):
                return {**self._sent, "tensors": [[places[number] for number in numbers], views]}
            case _:
                raise PayloadError("The table of tensors in this payload is malformed.")

    def open(
        self, resolve: Callable[[str], Any], submodule: Callable[[str], Any],
        device: Callable[[str], torch.device] = torch.device, called: Callable[[str], str] = str,
    ) -> SentBlocks:  # fmt: skip
        """Make the blocks and arguments. This runs code of the sender's.

        Args:
            resolve: returns the envoy at a path.
            submodule: returns what stands for the module at a path.
            device: returns the device to use for one that the sender had.
            called: returns what a file of the sender is called here.

        Raises:
            PayloadError: they are malformed, or refer to what is not to be had here.
        """
        sent = SentBlocks(self.laid(lambda piece: piece), lambda piece: piece, resolve, submodule, device, called)
        arguments = sent.values.get("arguments")
        if len(sent.blocks) != 1 + len(self.edits) or not _are_arguments(arguments):
            raise PayloadError("This payload has not the blocks and arguments of a run.")
        return sent


def _are_arguments(value: Any) -> bool:
    if type(value) is not tuple or len(value) != 2 or type(value[0]) is not tuple or type(value[1]) is not dict:
        return False
    return all(type(name) is str for name in value[1])


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise PayloadError("The header of this payload is malformed.")
    return value


def _is_name(entry: Any) -> bool:
    return type(entry) is list and len(entry) == 3 and all(type(part) is str for part in entry)
