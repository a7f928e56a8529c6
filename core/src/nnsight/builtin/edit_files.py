"""`model.export_edits(name)` and `model.import_edits(name)`: edits as source and tensors in a file. No pickle.

An edit is the text of its block and what its names are bound to: JSON values, tensors, numpy arrays, modules by their
import name, envoys by path. To import it is to run a function with those values as its arguments, in which the block
is captured as any other.
"""

from __future__ import annotations
import __future__ as future

import ast
import builtins
import importlib
import json
import linecache
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnsight.builtin import tensorfile
from nnsight.builtin.edit import Edit
from nnsight.capture.names import mangle
from nnsight.config import CONFIG
from nnsight.errors import EditFileError, NotInTreeError
from nnsight.kernel.envoy import Envoy as AnyEnvoy

if TYPE_CHECKING:
    from nnsight.capture.compiler import Block
    from nnsight.tracing.model import Envoy

_FORMAT = 1
_ITEM = "_nnsight_edit"  # what the block is an item of, in the function that is run to import it
_NOT_YET = "Cannot export an Envoy before calling .edit(): this model has no edits. Make some with `model.edit()`."
_REFUSED = (
    "The edit at {where} cannot be exported: {what}. An exported edit may use JSON values, tensors, numpy arrays, "
    "modules (`import torch`) and this model's own envoys; compute anything else inside of the block."
)


def export_edits(envoy: Envoy) -> Callable[..., Path]:
    """Return the method `model.export_edits(name, export_dir=None, variant="__default__")`."""

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
        tensors: dict[str, torch.Tensor] = {}
        edits = [_describe(kept, root, tensors) for kept in root.edits]
        path = _path(name, export_dir, variant)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensorfile.write(path, tensors, json.dumps({"format": _FORMAT, "edits": edits}))
        except OSError as error:
            raise EditFileError(f"Edits cannot be written to {str(path)!r}: {error.strerror or error}.") from error
        return path

    return export


def import_edits(envoy: Envoy) -> Callable[..., None]:
    """Return the method `model.import_edits(name, export_dir=None, variant="__default__")`."""

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
            tensors, text = tensorfile.read(path)
            about = json.loads(text)
            if about["format"] != _FORMAT:
                raise ValueError(f"its format is {about['format']}, and this version reads {_FORMAT}")
            edits = [(entry, _values(entry, envoy.root, tensors)) for entry in about["edits"]]
        except OSError as error:
            raise EditFileError(f"No edits can be read from {str(path)!r}: {error.strerror or error}.") from error
        except (ValueError, KeyError, TypeError, ImportError, NotInTreeError) as error:
            raise EditFileError(f"The edits in {str(path)!r} cannot be used: {error}.") from error
        for index, (entry, values) in enumerate(edits):
            edited = envoy.root.get(entry["envoy"])
            known = len(envoy.root.edits)
            _run(entry, {**values, _ITEM: Edit(edited, inplace=True)}, f"<edit {index} of {name}, {variant}>")
            if len(envoy.root.edits) == known:
                raise EditFileError(
                    f"The edits in {str(path)!r} cannot be used: number {index} is no block of its own."
                )

    return load


def _path(name: str, folder: str | os.PathLike[str] | None, variant: str) -> Path:
    for part in (name, variant):
        if part in ("", ".", "..") or Path(part).name != part:
            raise EditFileError(f"{part!r} cannot be the name of exported edits: it would be no plain file name.")
    root = CONFIG.APP.CACHE_DIR / "exports" if folder is None else Path(folder)
    return root / name / f"{variant}.safetensors"


# -- writing


def _describe(kept: Any, root: AnyEnvoy, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return an edit as JSON; its tensors are added to `tensors`."""
    scope = kept.scope.again()
    block: Block = scope.block
    if block.declared_global or any(isinstance(node, ast.Nonlocal) for node in ast.walk(block.node)):
        raise EditFileError(_REFUSED.format(where=block.where, what="it binds variables outside of itself"))
    private = {name for node in ast.walk(block.node) for name in _names(node) if mangle(name, block.owner) != name}
    if private:
        what = f"it uses {min(private)!r}, a private name of the class {block.owner!r}"
        raise EditFileError(_REFUSED.format(where=block.where, what=what))
    names: dict[str, Any] = {}
    for name, value in sorted(scope.environment().items()):
        if getattr(builtins, name, names) is not value:
            names[name] = _pack(value, f"its variable {name!r}", block, root, tensors)
    item = block.node.items[block.item]
    header = [ast.withitem(ast.Name(_ITEM, ast.Load()), item.optional_vars), *block.node.items[block.item + 1 :]]
    flags = [name for name in future.all_feature_names if block.flags & getattr(future, name).compiler_flag]
    source = ast.unparse(ast.fix_missing_locations(ast.With(items=header, body=block.node.body, lineno=1)))
    return {"envoy": kept.path, "source": source, "names": names, "future": flags}


def _names(node: ast.AST) -> tuple[str, ...]:
    found = getattr(node, "id", None) or getattr(node, "attr", None)
    return (found,) if isinstance(found, str) else ()


def _pack(value: Any, what: str, block: Block, root: AnyEnvoy, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON that refers to tensors by name: itself, or {kind: content}."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return {"float": value.hex()}  # JSON has no infinity
    if type(value) in (list, tuple):
        items = [_pack(item, f"{what}, item {index}", block, root, tensors) for index, item in enumerate(value)]
        return {type(value).__name__: items}
    if type(value) is dict and all(type(key) is str for key in value):
        return {
            "dict": {key: _pack(item, f"{what}, item {key!r}", block, root, tensors) for key, item in value.items()}
        }
    if isinstance(value, types.ModuleType) and sys.modules.get(value.__name__) is value:
        return {"module": value.__name__}
    if isinstance(value, AnyEnvoy) and value.root._module is root._module:
        return {"envoy": value.path}
    kind = "tensor" if type(value) is torch.Tensor else "array" if _is_array(value) else ""
    if kind:
        tensor = value if kind == "tensor" else _from_array(value)
        if tensor is not None and tensorfile.can_hold(tensor):
            name = f"{kind}.{len(tensors)}"
            tensors[name] = tensor
            return {kind: name, "grad": tensor.requires_grad}
    raise EditFileError(_REFUSED.format(where=block.where, what=f"{what} is of type {_name_of(type(value))}"))


def _is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray


def _from_array(value: Any) -> torch.Tensor | None:
    try:
        return torch.from_numpy(value.copy())
    except TypeError:
        return None


def _name_of(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


# -- reading


def _values(entry: dict[str, Any], root: AnyEnvoy, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    root.get(entry["envoy"])
    body = ast.parse(entry["source"]).body
    # So that nothing of it runs before a trace does.
    first = body[0].items[0].context_expr if len(body) == 1 and isinstance(body[0], ast.With) else None
    if not isinstance(first, ast.Name) or first.id != _ITEM:
        raise ValueError("it holds something else than edits")
    return {name: _unpack(packed, root, tensors) for name, packed in entry["names"].items()}


def _unpack(packed: Any, root: AnyEnvoy, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    kind, content = next(iter(packed.items()))
    if kind == "float":
        return float.fromhex(content)
    if kind in ("list", "tuple"):
        items = [_unpack(item, root, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {key: _unpack(item, root, tensors) for key, item in content.items()}
    if kind == "module":
        return importlib.import_module(content)
    if kind == "envoy":
        return root.get(content)
    if kind == "tensor":
        return tensors[content].requires_grad_(bool(packed["grad"]))
    if kind == "array":
        return tensors[content].numpy()
    raise ValueError(f"it holds a value of the unknown kind {kind!r}")


def _run(entry: dict[str, Any], values: dict[str, Any], filename: str) -> None:
    """Run a function whose body is the edit: its block is captured there."""
    tree = ast.parse("".join(f"from __future__ import {name}\n" for name in entry["future"]) + "def edit(): pass")
    (definition,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    definition.args.args = [ast.arg(name) for name in values]
    definition.body = ast.parse(entry["source"]).body
    source = ast.unparse(tree)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": "__edits__"}  # not ours: tracebacks show it
    exec(compile(source, filename, "exec", dont_inherit=True), namespace)
    namespace["edit"](**values)
