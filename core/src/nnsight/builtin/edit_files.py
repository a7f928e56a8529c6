"""`model.export_edits(name)` and `model.import_edits(name)`: edits as source and tensors in a file. No pickle.

What an edit is and uses is made data of as for a block that runs in another process (`nnsight.payload`). The file is a
safetensors file, with that data as JSON in its metadata.
"""

from __future__ import annotations

import itertools
import json
import linecache
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnsight._frames import at_users_line
from nnsight.builtin import tensorfile
from nnsight.builtin.edit import Edit
from nnsight.config import CONFIG
from nnsight.errors import EditFileError, NotInTreeError, PayloadError, UnsendableError
from nnsight.payload import SentBlocks, envoy_at, pack_blocks

if TYPE_CHECKING:
    from nnsight.tracing.model import Envoy

_FORMAT = 2
_NOT_YET = "Cannot export an Envoy before calling .edit(): this model has no edits. Make some with `model.edit()`."
_OUTSIDE = (
    "The edit at {where} cannot be exported: it binds variables outside of itself, which are not there where it is "
    "imported. Keep the value as an attribute of an envoy."
)


def export_edits(envoy: Envoy) -> Callable[..., Path]:
    """Return the method `model.export_edits(name, export_dir=None, variant="__default__")`."""

    @at_users_line
    def export(name: str, export_dir: str | os.PathLike[str] | None = None, variant: str = "__default__") -> Path:
        """Write all edits of the model to a file, as source and tensors.

        Args:
            name: what they are called.
            export_dir: the folder; `CONFIG.APP.CACHE_DIR / "exports"` by default.
            variant: which of several of that name.

        Returns:
            The path of the file, a safetensors file with the source in its metadata.

        Raises:
            EditFileError: there are none, or a variable that an edit uses cannot be written; nothing is written then.
        """
        root = envoy.root
        if not root.edits:
            raise EditFileError(_NOT_YET)
        path = _path(name, export_dir, variant)
        scopes = [kept.again().scope for kept in root.edits]
        for block in (scope.block for scope in scopes):
            if block.declared_global or block.bound & block.live:
                raise EditFileError(_OUTSIDE.format(where=block.where))
        pieces: dict[str, torch.Tensor] = {}

        def put(piece: torch.Tensor) -> str:
            pieces[f"piece.{len(pieces)}"] = piece.clone()
            return f"piece.{len(pieces) - 1}"

        try:
            sent = pack_blocks(root, scopes, put)
        except UnsendableError as error:
            raise EditFileError(f"The edits cannot be exported. {error}") from None
        about = {"format": _FORMAT, "envoys": [kept.path for kept in root.edits], "edits": sent}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensorfile.write(path, pieces, json.dumps(about))
        except OSError as error:
            raise EditFileError(f"Edits cannot be written to {str(path)!r}: {error.strerror or error}.") from error
        return path

    return export


def import_edits(envoy: Envoy) -> Callable[..., None]:
    """Return the method `model.import_edits(name, export_dir=None, variant="__default__")`."""

    @at_users_line
    def load(name: str, export_dir: str | os.PathLike[str] | None = None, variant: str = "__default__") -> None:
        """Add edits from a file to this wrapper, after those it has. They are code: import only what you trust.

        Args:
            name: what they were called.
            export_dir: the folder they were written to.
            variant: which of several of that name.

        Raises:
            EditFileError: there is no such file, it is damaged, or an edit is about what this model does not have.
        """
        path = _path(name, export_dir, variant)
        try:
            pieces, text = tensorfile.read(path)
            found = _read(json.loads(text), pieces, envoy.root, f"edits {name}, {variant}")
        except OSError as error:
            raise EditFileError(f"No edits can be read from {str(path)!r}: {error.strerror or error}.") from error
        except (ValueError, LookupError, TypeError, RecursionError, NotInTreeError) as error:
            raise EditFileError(f"The edits in {str(path)!r} cannot be used: {error}") from error
        for edited, block in found:
            Edit(edited, inplace=True).take(block.scope())

    return load


def _read(about: Any, pieces: dict[str, torch.Tensor], root: Any, called: str) -> list[tuple[Any, Any]]:
    """Return the edits of a file: what each is about, and its block.

    Raises:
        ValueError, LookupError, TypeError, NotInTreeError: it is damaged, or not for this model.
    """
    if about["format"] != _FORMAT:
        raise ValueError(f"its format is {about['format']}, and this version reads {_FORMAT}")
    edited = [envoy_at(root, path) for path in about["envoys"]]
    modules = {path: found._module for path, found in root.named_modules()}
    names: dict[str, str] = {}
    # Files of their own: the lines of the user's, and of edits that were imported before, must stay what they are.
    free = (f"<{called}>" if not n else f"<{called} ({n + 1})>" for n in itertools.count())

    def rename(filename: str) -> str:
        if filename not in names:
            names[filename] = next(name for name in free if name not in linecache.cache and name not in names.values())
        return names[filename]

    sent = SentBlocks(about["edits"], pieces.__getitem__, partial(envoy_at, root), modules.__getitem__, called=rename)
    if len(sent.blocks) != len(edited):
        raise PayloadError("It has not as many edits as it says.")
    return list(zip(edited, sent.blocks, strict=True))


def _path(name: str, folder: str | os.PathLike[str] | None, variant: str) -> Path:
    for part in (name, variant):
        if part in ("", ".", "..") or Path(part).name != part:
            raise EditFileError(f"{part!r} cannot be the name of exported edits: it would be no plain file name.")
    root = CONFIG.APP.CACHE_DIR / "exports" if folder is None else Path(folder)
    return root / name / f"{variant}.safetensors"
