"""What a seat needs of the model: its description, and traces whose input is prepared already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from nnsight import Envoy, NNsight, Tracer
from nnsight.protocols import Inputs
from nnsight_ndif.errors import FrameError
from nnsight_ndif.names import describe_names
from nnsight_ndif.window import DTYPES

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_AUTOCAST = (None, "bfloat16", "float16")


@contextmanager
def served(envoy: Envoy, method: str, function: Any, inputs: Inputs) -> Iterator[Tracer]:
    """Open a trace whose input is prepared already."""
    tracer = Tracer(_WithInputs(envoy, inputs), method, function, (), {})  # type: ignore[arg-type]
    with tracer:
        yield tracer


class _WithInputs:
    """An envoy to be traced with an input that is prepared already."""

    def __init__(self, envoy: Envoy, inputs: Inputs) -> None:
        self._envoy = envoy
        self._inputs = Inputs(inputs.args, inputs.kwargs, inputs.rows or 0)

    def _prepare(self, root: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        return self._inputs

    def _traced_root(self) -> Any:
        root = self._envoy.root
        return self if root is self._envoy else root

    def __getattr__(self, name: str) -> Any:
        return getattr(self._envoy, name)


def merged(inputs: list[Inputs]) -> Inputs:
    """Return the call that a trace's own arguments and its input make together."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    rows: int | None = None
    for one in inputs:
        args, kwargs = (*args, *one.args), {**kwargs, **one.kwargs}
        rows = one.rows if one.rows is not None else rows
    return Inputs(args, kwargs, rows)


def modes_here(kind: str = "cpu") -> list[Any]:
    """Return the modes that hold here, as `modes` takes them.

    Args:
        kind: the type of the device whose autocast is meant.
    """
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return [torch.is_grad_enabled(), None if dtype is None else str(dtype).partition(".")[2]]


def modes(how: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which the modes hold that the block's side has: gradients and autocast.

    Raises:
        FrameError: they are none.
    """
    match how:
        case [bool(has_gradients), dtype] if dtype in _AUTOCAST:
            pass
        case _:
            raise FrameError("a message tells no modes")
    held = ExitStack()
    held.enter_context(torch.set_grad_enabled(has_gradients))
    if dtype is not None or torch.is_autocast_enabled(device.type):
        held.enter_context(torch.autocast(device.type, DTYPES.get(dtype or ""), enabled=dtype is not None))
    return held


def helpers_of(root: NNsight) -> Mapping[str, frozenset[str]]:
    """Return the methods that a block may call of what stands beside the model, by its name."""
    named: Mapping[str, frozenset[str]] = getattr(type(root), "helpers", {})
    return {name: methods for name, methods in named.items() if getattr(root, name, None) is not None}


def methods_of(root: NNsight) -> dict[str, Any]:
    """Return what runs the model for each traceable method of its class, by name; None for the module itself."""
    found: dict[str, Any] = {"trace": None}
    for name in dir(type(root)):
        method: Any = getattr(type(root), name, None)
        if getattr(method, "is_traceable", False):
            found[name] = method.__wrapped__.__get__(root, type(root))
    return found


def moved(value: Any, device: torch.device) -> Any:
    """Return a value with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        return {key: moved(item, device) for key, item in value.items()}
    return value


def describe_tree(root: NNsight) -> list[Any]:
    """Return what a runner needs to know of a model: its modules, the locations, where steps end."""
    envoys = dict(root.named_modules())
    known = {id(envoy): path for path, envoy in envoys.items()}
    mounted = []
    for envoy in root._envoys.values():
        parent = envoy.parent
        if envoy.path not in envoys and parent is not None and known.get(id(parent)) is not None:
            mounted.append(envoy.path)
            envoys.update(envoy.named_modules())
    modules = [
        [path, type(envoy._module).__name__, [[name, child.path] for name, child in envoy._children.items()],
         envoy._module.training, isinstance(envoy._module, _CONTAINERS)]
        for path, envoy in envoys.items()
    ]  # fmt: skip
    locations = [[at.path, at.port] for at in root._tree.locations]
    helpers = {name: sorted(methods) for name, methods in helpers_of(root).items()}
    traceable = [name for name, function in methods_of(root).items() if function is not None]
    return [modules, mounted, locations, list(root._tree.ends), describe_names(root), helpers, traceable]
