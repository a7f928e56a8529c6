"""A model's tree as a type stub, so that editors complete `model.transformer.h[0].attn` and checkers know its parts.

Parts of one shape share a class. The classes do not derive from `Envoy`, which has any attribute there is: a checker
would then accept every misspelt name.
"""

from __future__ import annotations

import keyword
import re
from typing import Any

from torch import nn

from nnsight.kernel import growth
from nnsight.kernel.envoy import Envoy as KernelEnvoy
from nnsight.plugins import names as plugin_names

#: The first line of every stub: only a file that begins so is written over.
HEADER = "# Written by `python -m nnsight stubs`; run it again rather than edit."

_IMPORTS = """\
from collections.abc import Iterator
from typing import Any, Literal, Self, overload

import torch
from nnsight import Tracer
"""

#: The public face of an envoy; the tests compare it with the class.
_BASE = """\
class _Envoy:
    output: Any
    input: Any
    inputs: Any
    nns_output: Any
    nns_input: Any
    nns_inputs: Any
    edits: list[Any]
    @property
    def path(self) -> str: ...
    @property
    def parent(self) -> Any: ...
    @property
    def root(self) -> Any: ...
    @property
    def device(self) -> torch.device | None: ...
    @property
    def devices(self) -> set[torch.device]: ...
    @property
    def dtype(self) -> torch.dtype | None: ...
    @overload
    def trace(self, *args: Any, trace: Literal[False], **kwargs: Any) -> Any: ...
    @overload
    def trace(self, *args: Any, **kwargs: Any) -> Tracer: ...
    def skip(self, value: Any) -> None: ...
    def next(self, step: int = 1) -> Self: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...
    def cpu(self) -> Self: ...
    def cuda(self, device: int | torch.device | None = None) -> Self: ...
    def get(self, path: str) -> Any: ...
    def modules(self, include_fn: Any = None, names: bool = False) -> list[Any]: ...
    def named_modules(self) -> Iterator[tuple[str, Any]]: ...
    def mount(self, name: str, module: torch.nn.Module, ends_steps: bool = False) -> Any: ...
    def rebind(self, module: torch.nn.Module) -> None: ...
    def copy_wrapper(self) -> Self: ...
    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any: ...
    def __contains__(self, name: object) -> bool: ...
"""


def write_stub(root: KernelEnvoy) -> str:
    """Return the stub of a model's tree: a class for every shape of module, and `Model`, which is the root's.

    Args:
        root: the model.
    """
    writer = _Writer()
    name = writer.class_of(root, root)
    others = sorted({*plugin_names("nnsight.envoy"), *_public(nn.Module)} - _known(_BASE))
    base = _BASE + "".join(f"    {other}: Any\n" for other in others if _is_name(other))
    return "\n".join([HEADER, _IMPORTS, "", base, *writer.texts, f"Model = {name}\n"])


class _Writer:
    """Collects classes, each after those that it refers to."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._names: dict[tuple[str, str], str] = {}
        self._taken: set[str] = set()
        self._inherited = {*_known(_BASE), *_public(nn.Module), *plugin_names("nnsight.envoy")}

    def class_of(self, envoy: KernelEnvoy, root: KernelEnvoy) -> str:
        """Return the name of the class for a part, writing it if there is none of its shape yet."""
        children = {
            name: self.class_of(child, root)
            for name, child in growth.children(envoy).items()
            if child._path == f"{envoy._path}.{name}"
        }
        body = self._attributes(envoy, children) + self._names_beside(envoy, root, children) + _items(children)
        kind = re.sub(r"\W", "_", type(envoy._module).__name__)
        known = self._names.get((kind, body))
        if known is not None:
            return known
        name, number = kind, 1
        while name in self._taken or name in ("Model", "Tracer", "Any", "Self", "Literal", "Iterator"):
            number += 1
            name = f"{kind}_{number}"
        self._taken.add(name)
        self._names[kind, body] = name
        self.texts.append(f"class {name}(_Envoy):\n{body or '    pass' + chr(10)}")
        return name

    def _attributes(self, envoy: KernelEnvoy, children: dict[str, str]) -> str:
        """Return the lines for what the module and its envoy have beside modules."""
        module = envoy._module
        tensors = {**module._parameters, **module._buffers}
        found: dict[str, str] = {name: "torch.Tensor" for name, value in tensors.items() if value is not None}
        for name in sorted({*_public(type(module)), *_public(type(envoy)), *vars(module), *vars(envoy)}):
            value = {**vars(module), **vars(envoy)}.get(name)
            if name not in self._inherited and name not in children and not isinstance(value, KernelEnvoy):
                found.setdefault(name, _type_of(value))
        return "".join(f"    {name}: {kind}\n" for name, kind in found.items() if _is_name(name))

    def _names_beside(self, envoy: KernelEnvoy, root: KernelEnvoy, children: dict[str, str]) -> str:
        """Return the lines for the parts: children, those mounted beside them, and other names for parts."""
        lines = []
        for name, kind in children.items():
            lines.append((f"E_{name}" if name in envoy._own else name, kind))
        for name, value in vars(envoy).items():
            is_beside = isinstance(value, KernelEnvoy) and name not in children and not name.startswith(("_", "E_"))
            if is_beside:
                lines.append((name, self.class_of(value, root)))
        return "".join(f"    {name}: {kind}\n" for name, kind in lines if _is_name(name))


def _items(children: dict[str, str]) -> str:
    """Return the lines for `model.h[0]`, where a module has numbered parts, or parts with names that are none."""
    numbered = {name: kind for name, kind in children.items() if name.isdigit()}
    named = {name: kind for name, kind in children.items() if not name.isdigit()}
    lines = []
    kinds = list(dict.fromkeys(numbered.values()))
    if len(kinds) > 1:
        lines += [(f"Literal[{name}, {name!r}]", kind) for name, kind in numbered.items()]
    if numbered:
        lines.append(("int", " | ".join(kinds)))
    if len(kinds) == 1:
        lines.append((f"Literal[{', '.join(map(repr, numbered))}]", kinds[0]))
    lines += [(f"Literal[{name!r}]", kind) for name, kind in named.items()]
    if not lines:
        return ""
    text = "".join(f"    @overload\n    def __getitem__(self, key: {key}) -> {kind}: ...\n" for key, kind in lines)
    every = " | ".join(dict.fromkeys(children.values()))
    text += f"    @overload\n    def __getitem__(self, key: slice) -> list[{every}]: ...\n"
    return text + f"    def __iter__(self) -> Iterator[{every}]: ...\n    def __len__(self) -> int: ...\n"


def _public(cls: type[Any]) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def _known(text: str) -> set[str]:
    """Return the names that the lines of a class declare."""
    return set(re.findall(r"^    (?:def )?(\w+)[:(]", text, re.MULTILINE))


def _type_of(value: object) -> str:
    return type(value).__name__ if isinstance(value, bool | int | float | str) else "Any"


def _is_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")
