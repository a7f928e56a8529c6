"""What a seat needs of the model: its description, and traces whose input is prepared already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nnsight import Envoy, NNsight, Tracer
from nnsight.protocols import Inputs
from nnsight_ndif.names import describe_names


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
         envoy._module.training]
        for path, envoy in envoys.items()
    ]  # fmt: skip
    locations = [[at.path, at.port] for at in root._tree.locations]
    return [modules, mounted, locations, list(root._tree.ends), describe_names(root)]
