"""What a block may ask of the model beside its values: calls of modules, attributes, gradients, the model's helpers.

Helpers are objects beside the module, such as a tokenizer. They stay with the model, and a block may call those of
their methods that the model class names.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from nnsight import InputError, NNsight
from nnsight_ndif.channel import Kind
from nnsight_ndif.errors import FrameError, NotInRunnerError
from nnsight_ndif.guard import Guard
from nnsight_ndif.served import helpers_of, modes, moved
from nnsight_ndif.shown import Shown
from nnsight_ndif.values import is_data, is_plain

_MAX_NUMBER = 1 << 24  # in what a helper is given: it may be a length to pad to
Reply = tuple[Kind, Any]


class Asked:
    """Answers for the modules of a model.

    Args:
        root: the model.
        shown: the values that the block was shown.
        guard: checks what modules are given.
    """

    def __init__(self, root: NNsight, shown: Shown, guard: Guard) -> None:
        self._root = root
        self._shown = shown
        self._guard = guard
        self._envoys = dict(root.named_modules())
        self._helpers = helpers_of(root)

    def value(self, value: Any) -> Reply:
        """Return the reply with a value."""
        return Kind.VALUE, self._shown.pack(value)

    def envoy(self, path: str) -> Any:
        """Return the envoy at a path."""
        envoy = self._envoys.get(path)
        if envoy is None:
            raise FrameError(f"a message names the module {path!r}, which is not there")
        return envoy

    def module(self, path: str) -> nn.Module:
        """Return the module at a path."""
        module: nn.Module = self.envoy(path)._module
        return module

    def call(self, request: Any) -> Reply:
        """Call a module beside the run."""
        module, args, kwargs, modes = self.arguments(request)
        with modes:
            return self.value(module(*args, **kwargs))

    def arguments(self, request: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], AbstractContextManager[Any]]:
        """Return a module that is to be called, with what, and the modes that hold for the call."""
        match request:
            case [str(path), tuple(args), dict(kwargs), how]:
                module = self.module(path)
            case _:
                raise FrameError("a request to call a module is malformed")
        device = next((tensor.device for tensor in module.parameters()), self._root.device or torch.device("cpu"))
        args = moved(self._shown.unpack(args), device)
        kwargs = moved(self._shown.unpack(kwargs), device)
        if not all(type(name) is str for name in kwargs):
            raise FrameError("a request to call a module has arguments without names")
        self._guard.check_arguments(module, (args, kwargs))
        return module, args, kwargs, modes(how, device)

    def backward(self, request: Any) -> Reply:
        """Answer with the gradients before a tensor that the block was shown."""
        match request:
            case [key, data]:
                return self.value(self._shown.edges.pull(key, self._shown.unpack(data)))
            case _:
                raise FrameError("a request for gradients is malformed")

    def attribute(self, request: Any) -> Reply:
        """Answer with an attribute of a module, or data that its envoy has: whether it is there, and its value."""
        match request:
            case [str(path), None]:
                return self.value((True, next((p.dtype for p in self.module(path).parameters()), None)))
            case [str(path), bool(is_envoy), ""]:
                return self.value((True, repr(self.envoy(path) if is_envoy else self.module(path))))
            case [str(path), str(name)]:
                return self._module_attribute(path, name)
            case _:
                raise FrameError("a request for an attribute is malformed")

    def _module_attribute(self, path: str, name: str) -> Reply:
        module = self.module(path)
        if name.startswith("_"):
            return self.value((False, None))
        missing = object()
        value = vars(module).get(name, missing)
        for table in (module._parameters, module._buffers):
            value = table.get(name, value)
        if value is missing:
            value = getattr(type(module), name, missing)
            if value is missing:
                value = vars(self.envoy(path)).get(name, missing)
                return self.value((True, value) if is_data(value) else (False, None))
            if isinstance(value, property):
                value = getattr(module, name)
        if callable(value):
            raise NotInRunnerError(
                f"`{path}.{name}` is a method of the model, and a block in a runner can call modules only: "
                f"`{path}(...)`, or what is below it."
            )
        return self.value((True, value))

    def help(self, request: Any) -> Reply:
        """Answer with what a method of a helper returns, or with an attribute of one."""
        match request:
            case [str(name), str(method), args, kwargs] if name in self._helpers:
                helper, methods = getattr(self._root, name), self._helpers[name]
            case _:
                raise FrameError("a request for help is malformed")
        if method in methods:
            args, kwargs = self._shown.unpack(args), self._shown.unpack(kwargs)
            if type(args) is not tuple or type(kwargs) is not dict or not all(type(key) is str for key in kwargs):
                raise FrameError("a request for help has no arguments")
            _check_sizes((args, kwargs))
            return self.value(getattr(helper, method)(*args, **kwargs))
        if method.startswith("_"):
            raise AttributeError(f"{type(helper).__name__!r} object has no attribute {method!r}")
        value = getattr(helper, method)
        if is_plain(value):
            return self.value(value)
        raise NotInRunnerError(
            f"`{self._root.path}.{name}.{method}` stays with the model. A block in a runner can use "
            f"{', '.join(sorted(methods))} of its {name}, and attributes that are plain data; use it before the block."
        )


def _check_sizes(value: Any) -> None:
    """Refuse numbers that could make a helper take memory without end."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            _check_sizes(item)
    elif isinstance(value, int) and abs(value) > _MAX_NUMBER:
        raise InputError(f"A helper of the model was given the number {value}; {_MAX_NUMBER} is the most.")
