"""A block as data: its text, at its place in the user's file, and what its names are bound to. And what it saved.

The text is run at the lines and columns it has in the file, so tracebacks, warnings and the capture of invokes inside
of it are as they are there.
"""

from __future__ import annotations
import __future__ as future

import ast
import builtins
import dataclasses
import importlib
import linecache
import os
import sys
import sysconfig
import types
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

from nnsight import Cache, Envoy
from nnsight_ndif import definitions
from nnsight_ndif.errors import FrameError, NotInRunnerError
from nnsight_ndif.held import Held
from nnsight_ndif.values import pack_simple, unpack_simple
from nnsight_ndif.wire import Special

_REFUSED = (
    "{what} of the block at {where} is a {kind}, which cannot be sent to a runner. Values of Python's own types, "
    "tensors, numpy arrays, functions, classes and dataclasses of your files, modules and what installed packages "
    "define can be; make anything else inside of the block."
)


# -- in the caller's process


def dump(block: Any, environment: dict[str, Any], root: Any, put: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    """Return a block as data.

    Args:
        block: what is known of it from its source.
        environment: the values it reads from where it is written.
        root: the model.
        put: lays a tensor where the runner finds it.

    Raises:
        NotInRunnerError: a name is bound to what cannot be sent, or the block binds variables outside of itself.
    """
    if block.declared_global or any(isinstance(node, ast.Nonlocal | ast.Global) for node in ast.walk(block.node)):
        raise NotInRunnerError(f"The block at {block.where} binds variables outside of itself, which stay here.")
    bindings: dict[str, Any] = {}
    defined: dict[int, Any] = {}
    for name, value in environment.items():
        if getattr(builtins, name, bindings) is not value:
            packer = _Packer(f"The variable {name!r}", block.where, root, put, defined)
            bindings[name] = packer.pack(value)
    line, text = _text(block)
    return {
        "definitions": {key: described for key, (described, _) in defined.items()},
        "filename": block.filename, "line": line, "text": text, "target": block.target, "bindings": bindings,
        "names": sorted(block.bound), "name": block.name,
        "future": [name for name in future.all_feature_names if block.flags & getattr(future, name).compiler_flag],
    }  # fmt: skip


def dump_arguments(arguments: Any, where: str, root: Any, put: Callable[[torch.Tensor], Any]) -> Any:
    """Return what a trace was given as data: `(args, kwargs)`."""
    return _Packer("An argument", where, root, put, None).pack(arguments)


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


def _text(block: Any) -> tuple[int, str]:
    """Return the text of a block's body under a header of its own, and the number of the header's line."""
    node = block.node
    if not isinstance(block.target, str | None):
        raise NotInRunnerError(f"The block at {block.where} cannot be sent: let its `as` bind one name.")
    later, first = node.items[block.item + 1 :], node.body[0]
    header = f"with {', '.join(map(ast.unparse, later))}:" if later else "if True:"
    start = min(part.lineno for part in (first, *getattr(first, "decorator_list", ())))
    lines = [linecache.getline(block.filename, number) for number in range(start, node.end_lineno + 1)]
    if not lines[-1]:
        raise NotInRunnerError(f"The text of the block at {block.where} is not to be had.")
    before = len(lines[0].encode()[: first.col_offset].decode())
    if lines[0][:before].isspace():
        return start - 1, header + "\n" + "".join(lines)
    # The body is on the header's line: it stays at its column, where there is room.
    return start, header.ljust(before) + " " * (len(header) >= before) + lines[0][before:] + "".join(lines[1:])


class _Packer:
    """Makes data of what a block's names are bound to."""

    def __init__(
        self, what: str, where: str, root: Any, put: Callable[[torch.Tensor], Any], definitions: dict[int, Any] | None
    ) -> None:
        self._definitions = definitions
        self._what = what
        self._where = where
        self._root = root
        self._put = put

    def pack(self, value: Any) -> Any:
        if isinstance(value, Envoy) and value.root is self._root:
            return Special("envoy", value.path)
        if isinstance(value, torch.Tensor):
            if type(value) not in (torch.Tensor, torch.nn.Parameter):
                raise self._refuse(value)
            return Special("given", [self._put(value), value.requires_grad])
        if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
            return Special("array", self._put(torch.from_numpy(value.copy())))
        found = pack_simple(value, self.pack)
        if found is not NotImplemented:
            return found
        if isinstance(value, types.ModuleType) and _is_installed(value):
            return Special("import", [value.__name__, ""])
        name, module = getattr(value, "__qualname__", None), sys.modules.get(getattr(value, "__module__", None) or "")
        if isinstance(name, str) and module is not None and _is_installed(module) and _at(module, name) is value:
            return Special("import", [module.__name__, name])
        return self._pack_own(value)

    def _pack_own(self, value: Any) -> Any:
        """Return as data what the user's own files define: functions, classes, and what is made of such classes."""
        kind = type(value)
        if isinstance(value, types.FunctionType | type) and self._definitions is not None:
            return self._define(value)
        if isinstance(value, types.MethodType):
            return Special("method", [self.pack(value.__self__), value.__name__])
        if isinstance(value, Enum):
            return Special("member", [self.pack(kind), value.name])
        if dataclasses.is_dataclass(value) and hasattr(value, "__dict__"):
            return Special("instance", [self.pack(kind), {name: self.pack(item) for name, item in vars(value).items()}])
        raise self._refuse(value)

    def _define(self, value: Any) -> Special:
        assert self._definitions is not None
        if id(value) not in self._definitions:
            self._definitions[id(value)] = None, value  # it may use itself; and kept, so that its `id` stays its own

            def pack(what: str, inner: Any) -> Any:
                outer, self._what = self._what, f"{self._what}: {what}"
                packed = self.pack(inner)
                self._what = outer
                return packed

            try:
                self._definitions[id(value)] = definitions.describe(value, pack), value
            except definitions.Unsendable as error:
                raise NotInRunnerError(f"{self._what} of the block at {self._where} is {error}.") from None
        return Special("defined", id(value))

    def _refuse(self, value: Any) -> NotInRunnerError:
        return NotInRunnerError(
            _REFUSED.format(what=self._what, where=self._where, kind=f"{type(value).__module__}.{type(value).__name__}")
        )


def _is_installed(module: types.ModuleType) -> bool:
    """Return whether the runner can import a module by its name."""
    if module.__name__ == "__main__":
        return False
    file: str | None = getattr(module, "__file__", None)
    if file is None or module.__name__.partition(".")[0].startswith("nnsight"):
        return True
    roots = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots |= {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")}
    return file.startswith(tuple(roots))


def _at(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


# -- in the runner


class Block:
    """A block, rebuilt.

    Args:
        order: what `dump` returned.
        namespace: where its names will be.
        model: the stand-in of the model.
        held: reads what the model's end has sent.
    """

    def __init__(self, order: dict[str, Any], namespace: dict[str, Any], model: Any, held: Held) -> None:
        self._namespace = namespace
        self._target = order["target"]
        self._model = model
        self._held = held
        self._definitions = definitions.Definitions(order["definitions"], self.unpack)
        for name, data in order["bindings"].items():
            namespace[name] = self.unpack(data)
        filename, text = order["filename"], "\n" * (order["line"] - 1) + order["text"]
        # At last: what is captured inside of the block is found by this text.
        linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
        flags = 0
        for name in order["future"]:
            flags |= getattr(future, name).compiler_flag
        code = compile(text, filename, "exec", flags, dont_inherit=True)
        self._code = code.replace(co_name=order["name"])

    def run(self, entered: Any) -> None:
        """Run it, with `entered` for what `as` binds."""
        if self._target is not None:
            self._namespace[self._target] = entered
        exec(self._code, self._namespace)

    def unpack(self, data: Any) -> Any:
        found = unpack_simple(data, self.unpack)
        if found is not NotImplemented:
            return found
        match data:
            case Special("envoy", path):
                return self._model.get(path)
            case Special("given", [place, requires_grad]):
                return self._held.unpack(Special("fresh", place)).requires_grad_(requires_grad)
            case Special("array", place):
                return self._held.unpack(Special("fresh", place)).numpy()
            case Special("defined", key):
                return self._definitions.get(key)
            case Special("method" | "member", [owner, name]):
                return getattr(self.unpack(owner), name)
            case Special("instance", [kind, fields]):
                new = object.__new__(self.unpack(kind))
                new.__dict__.update({name: self.unpack(item) for name, item in fields.items()})
                return new
            case Special("import", [module, name]):
                found = importlib.import_module(module)
                return _at(found, name) if name else found
        raise AssertionError(f"a block holds {data}")


def results(
    namespace: dict[str, Any], saved: dict[int, Any], names: list[str], held: Held, theirs: dict[int, int]
) -> dict[str, Any]:
    """Return as data what comes back of a block: what its names are bound to, where that was saved."""
    held.begin()
    found = {}
    for name in names:
        if name in namespace and id(namespace[name]) in saved:
            try:
                found[name] = _pack_result(namespace[name], held, theirs)
            except NotInRunnerError as error:
                raise NotInRunnerError(f"What the block saved as {name!r} cannot come back: {error}") from None
    return found


def _pack_result(value: Any, held: Held, theirs: dict[int, int]) -> Any:
    if not isinstance(value, Cache):
        return held.pack(value)
    records = [[theirs[number], occurrence, held.pack(seen)] for number, occurrence, seen in value._records]
    return Special("cache", [*value._ports, records])
