"""The body of a captured block as data, and the block made of it where it is to run.

The text keeps its place in the user's file, so tracebacks, warnings and the capture of invokes inside of it are as they
are there. A block at the top of a file runs in the globals of that file; any other is compiled as a captured block is.
"""

from __future__ import annotations

import ast
import functools
import types
from collections.abc import Callable
from typing import Any

from nnsight.capture.cells import Scope
from nnsight.capture.compiler import ENTERED, Block
from nnsight.errors import PayloadError, UnsendableError
from nnsight.kernel.envoy import Envoy
from nnsight.payload.defining import Definitions
from nnsight.payload.names import attributes_of
from nnsight.payload.outside import Outside
from nnsight.payload.packing import Packer
from nnsight.payload.sources import FUTURES, parse_one, remember_lines, source_lines
from nnsight.payload.unpacking import Unpacker

_MISSING = object()
_FUNCTION, _CLASS = 0x3, 0x0  # code flags: optimized, with locals of its own
_NO_TEXT = "The text of the block at {where} is not to be had any more: its file has changed. Run it again."


def pack_block(packer: Packer, scope: Scope) -> dict[str, Any]:
    """Return a block as data, with what it uses from where it is written.

    Args:
        packer: makes data of values; must have descriptions.
        scope: the block and its variables.

    Raises:
        UnsendableError: a name that it uses is bound to what cannot travel.
    """
    block, descriptions = scope.block, packer.descriptions
    assert descriptions is not None
    packer.where = block.where
    values, live, namespace = scope.outside()
    kind = "function" if block.is_function else "class" if block.is_class else "module"
    uses = functools.partial(attributes_of, nodes=block.parts)
    what = "The variable '{name}'"
    names = block.exposed | block.declared_global
    own = {*values, *live}
    if kind == "module":  # its variables are the globals, unless it was run with others (`exec`)
        own = {name for name, value in values.items() if namespace.get(name, _MISSING) is not value}
        # Functions that share the globals would keep the model, and the model keeps the edits that use them.
        own |= {name for name, value in values.items() if isinstance(value, Envoy)}
    data: dict[str, Any] = {
        "kind": kind, "filename": block.filename, "name": block.name, "qualname": block.qualname, "first": block.first,
        "futures": [name for name, flag in FUTURES.items() if block.flags & flag],
        "local": sorted(block.local & block.names), "global": sorted(block.declared_global),
        "module": descriptions.use(namespace, names - own, what, uses),
    }  # fmt: skip
    data["line"], data["text"] = _text(block, namespace)
    data["live"] = {
        name: descriptions.cell(cell, what.format(name=name), functools.partial(uses, name))
        for name, cell in live.items()
    }
    data["values"] = {
        name: packer.guarded(
            what.format(name=name),
            functools.partial(descriptions.value, value, functools.partial(uses, name)),
        )
        for name, value in values.items()
        if name in own
    }
    return data


def _text(block: Block, namespace: dict[str, Any]) -> tuple[int, str]:
    """Return the text of a block's body under a header of its own, and the number of the header's line."""
    node = block.node
    target, later, first = node.items[block.item].optional_vars, node.items[block.item + 1 :], node.body[0]
    entered = "_" if target is None else f"_ as {ast.unparse(target)}"
    header = f"with {', '.join([entered, *map(ast.unparse, later)])}:"
    start = min(part.lineno for part in (first, *getattr(first, "decorator_list", ())))
    lines = source_lines(block.filename, namespace)[start - 1 : node.end_lineno]
    if len(lines) <= (node.end_lineno or start) - start:
        raise UnsendableError(_NO_TEXT.format(where=block.where))
    before = len(lines[0].encode()[: first.col_offset].decode())
    if not lines[0][:before] or lines[0][:before].isspace():
        return start - 1, header + "\n" + "".join(lines)
    # The body is on the header's line: it stays at its column, where there is room.
    return start, header.ljust(before) + " " * (len(header) >= before) + lines[0][before:] + "".join(lines[1:])


class SentBlock:
    """A block that was sent, made again.

    Args:
        data: what `pack_block` returned.
        unpacker: makes values of data.
        called: returns what a file of the sender is called here.

    Attributes:
        names: the names that it binds where it was written.

    Raises:
        PayloadError: it is no block.
    """

    def __init__(self, data: Any, unpacker: Unpacker, called: Callable[[str], str] = str) -> None:
        assert unpacker.definitions is not None
        match data:
            case {"kind": "module" | "function" | "class" as kind, "filename": str(filename), "line": int(line),
                  "text": str(text), "live": dict(live), "values": dict(values), "module": int(module)}:  # fmt: skip
                pass
            case _:
                raise PayloadError("The block in this payload is malformed.")
        if "\0" in filename:
            raise PayloadError("The block in this payload is of no file.")
        filename = called(filename)
        self._kind = kind
        self._block = _block(data, filename, line, text)
        definitions = unpacker.definitions
        self._namespace = definitions.namespace(module)
        self._module = module
        self._values = {name: unpacker.value(value) for name, value in values.items()}
        self._live = {name: definitions.cell(number) for name, number in live.items()}
        if not self._block.live <= self._live.keys():
            raise PayloadError("The block in this payload shares variables that are not in it.")
        self.names = self._block.bound | self._block.declared_global
        self._scope: Scope | None = None
        remember_lines(filename, line, text)

    def outside(self, definitions: Definitions) -> Outside:
        """Return what it finds outside of itself, before it is run."""
        return definitions.outside(self._values, self._live, self.names, self._module)

    def scope(self) -> Scope:
        """Return its variables, for a block that is to wait for its turn."""
        values = self._values
        if self._kind == "module":
            known = {**self._namespace, **values}
            values = {name: known[name] for name in self._block.names if name in known}
        return Scope.of_values(self._block, self._namespace, values, self._live)

    def run(self, entered: object) -> None:
        """Run it in the caller's context.

        Args:
            entered: what `as` binds.
        """
        if self._kind == "module":
            self._namespace.update({**self._values, ENTERED: entered})
            exec(_module_code(self._block), self._namespace)
        else:
            self._scope = self.scope()
            self._scope.function(entered, _refuse_to_wait)()

    def bound(self) -> dict[str, Any]:
        """Return what it has bound its names to."""
        block, names = self._block, self._block.declared_global
        found = {}
        if self._scope is None:
            names = self.names
        else:
            found.update(self._scope.bindings()[0])
            for name in sorted(block.bound & block.live):
                if self._scope.has(name):
                    found[name] = self._scope.content(name)
        found.update({name: self._namespace[name] for name in sorted(names) if name in self._namespace})
        return found


def _block(data: dict[str, Any], filename: str, line: int, text: str) -> Block:
    """Return what is known of a block from its text."""
    match data:
        case {"name": str(name), "qualname": str(qualname), "first": str(first), "futures": list(futures),
              "local": list(local), "live": dict(live), "global": list(declared), "kind": str(kind)}:  # fmt: skip
            pass
        case _:
            raise PayloadError("The block in this payload is malformed.")
    known = [*local, *live, *declared, *([first] if first else [])]
    if not all(type(name) is str and name.isidentifier() for name in known) or "\0" in name + qualname:
        raise PayloadError(f"The block in this payload has a name that is none: {known}.")
    if not 0 < line < 1 << 24 or not all(type(name) is str and name in FUTURES for name in futures):
        raise PayloadError("The block in this payload is at no place that it can be at.")
    try:
        node = parse_one(text, line)
    except (RecursionError, MemoryError) as error:
        raise PayloadError(f"The text of the block in this payload cannot be read: {error}.") from None
    if not isinstance(node, ast.With):
        raise PayloadError("The text of the block in this payload is not one block.")
    flags = functools.reduce(lambda found, name: found | FUTURES.get(name, 0), futures, 0)
    shape = {"module": 0, "function": _FUNCTION, "class": _CLASS}[kind]
    own = tuple(name for name in local if name not in live)
    code = _EMPTY.replace(
        co_filename=filename, co_name=name if kind != "module" else "<module>", co_qualname=qualname, co_varnames=own,
        co_nlocals=len(own), co_argcount=0, co_posonlyargcount=0, co_kwonlyargcount=0, co_freevars=tuple(live),
        co_flags=flags | shape,
    )  # fmt: skip
    block = Block(node, 0, code, first, is_nested=False)
    if block.unmovable:
        raise PayloadError(f"The block in this payload has a `{type(block.unmovable[0]).__name__}` that leaves it.")
    return block


def _module_code(block: Block) -> types.CodeType:
    """Compile a block to run at the top of its file."""
    node = block.node
    place: dict[str, Any] = {"lineno": node.lineno, "col_offset": 0, "end_lineno": node.lineno, "end_col_offset": 0}
    body: list[ast.stmt] = list(node.body)
    if len(node.items) > 1:
        body = [ast.copy_location(ast.With(items=node.items[1:], body=body), node)]
    target = node.items[0].optional_vars
    if target is not None:
        body.insert(0, ast.Assign(targets=[target], value=ast.Name(ENTERED, ast.Load(), **place), **place))
    tree = ast.Module(body=body, type_ignores=[])
    code: types.CodeType = compile(tree, block.filename, "exec", block.flags, dont_inherit=True)
    return code


def _refuse_to_wait(scope: Scope, name: str) -> None:
    raise AssertionError(f"a block without siblings waited for {name}")


def _nothing() -> None: ...


_EMPTY = _nothing.__code__
