"""The model as a block sees it in a runner: a tree of stand-ins without weights, and a run that is told what happens.

Everything else is the ordinary library: the stand-in's forward asks the model's process where the real run stands, and
visits the same locations here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from nnsight import Envoy, NNsight, payload, plugins, traceable
from nnsight.protocols import Elsewhere, Inputs
from nnsight_ndif.channel import Kind
from nnsight_ndif.errors import FrameError, NotInRunnerError, function_of
from nnsight_ndif.link import Link, Prepared
from nnsight_ndif.names import GivenNames


class Helper:
    """Stands for what the model has beside its modules, such as a tokenizer. It stays there, and so does its work."""

    def __init__(self, link: Link, name: str, methods: list[str]) -> None:
        self._link = link
        self._name = name
        self._methods = methods

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("__call__", args, kwargs)

    def __len__(self) -> int:
        return int(self._ask("__len__", (), {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._methods:
            return lambda *args, **kwargs: self._ask(name, args, kwargs)
        return self._ask(name, (), {})

    def _ask(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._link.ask(Kind.HELP, [self._name, name, args, kwargs])[1]


class StandIn(nn.Module):
    """Stands for a module of the model. It has the module's children, and asks for everything else."""

    def __init__(self, link: Link, path: str, is_training: bool) -> None:
        super().__init__()
        self.training = is_training
        self.__dict__["_link"] = link
        self.__dict__["_at"] = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Prepared):
            return self._link.drive(self._at, "trace", *args)
        return self._link.call(self._at, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
        _, (is_there, value) = self._link.ask(Kind.ATTRIBUTE, [self._at, name])
        if not is_there:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if "_at" in self.__dict__ and name not in self.__dict__:
            raise NotInRunnerError(f"A block in a runner cannot change the model: `{self._at}.{name}` was assigned.")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return str(self._link.ask(Kind.ATTRIBUTE, [self._at, False, ""])[1][1])

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self._refuse("parameters")

    parameters = buffers = named_buffers = named_parameters

    def train(self, mode: bool = True) -> Any:
        raise NotInRunnerError(f"A block in a runner cannot change the model: `{self._at}.train({mode})` was called.")

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        raise NotInRunnerError(f"A block in a runner cannot change the model: `{self._at}` would be moved or cast.")

    def _hook(self, *args: Any, **kwargs: Any) -> Any:
        raise NotInRunnerError(f"`{self._at}`: hooks of a block in a runner would never be called. Use `.output`.")

    register_forward_hook = register_forward_pre_hook = _hook
    register_full_backward_hook = register_full_backward_pre_hook = _hook

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._refuse("state_dict")

    def _refuse(self, what: str) -> Any:
        raise NotInRunnerError(
            f"`{self._at}.{what}()` would fetch all weights into the runner. Ask for single ones by name: "
            f"`{self._at}.weight`."
        )


class StandInContainer(StandIn):
    """Stands for modules in a row, or by name: they can be indexed and gone through."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._modules[key]
        return list(self._modules.values())[key]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Any:
        return iter(self._modules.values())


class StandInEnvoy(Envoy):
    """An envoy in a runner, where every tensor is on the CPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def devices(self) -> set[torch.device]:
        return {torch.device("cpu")}

    @property
    def source(self) -> Any:
        link: Link = self._module._link  # type: ignore[assignment]
        provider: Elsewhere = plugins.resolve("nnsight.envoy", "source")
        return provider.made(partial(payload.envoy_at, self.root), self._path, link.look_inside, link.place)

    @property
    def dtype(self) -> Any:
        return self._module._link.ask(Kind.ATTRIBUTE, [self._path, None])[1][1]  # type: ignore[union-attr, operator]

    def __repr__(self) -> str:
        return str(self._module._link.ask(Kind.ATTRIBUTE, [self._path, True, ""])[1][1])  # type: ignore[union-attr, operator]

    def _prepare(self, root: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        _, (handle, rows) = self._module._link.ask(Kind.PREPARE, [self._path, method, args, kwargs])  # type: ignore[union-attr, operator]
        return Inputs((Prepared(handle),), {}, rows)

    def _join(self, inputs: Sequence[Inputs]) -> Inputs:
        if len(inputs) == 1:
            return inputs[0]
        handles = [one.args[0].handle for one in inputs]
        _, (handle, rows) = self._module._link.ask(Kind.JOIN, [self._path, handles])  # type: ignore[union-attr, operator]
        return Inputs((Prepared(handle),), {}, rows)

    def _without_input(
        self, method: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        return function  # the real model says whether it can be run without

    def _lookup(self, name: str) -> Any:
        found = super()._lookup(name)
        untold = getattr(self.root, "untold", "")
        if found is None and untold:
            raise NotInRunnerError(
                f"`{self._path}` has no {name!r} in a runner: the model's own classes are not there. {untold}"
            )
        return found

    def _tables(self) -> set[int]:
        return self._module._link.held.tables  # type: ignore[union-attr, return-value]

    def _open(
        self, method: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], remote: Any, backend: Any,
        batched: bool,
    ) -> Any:  # fmt: skip
        if method == "trace" and function is not None:
            function = self._module._link.given(function_of(function))  # type: ignore[union-attr, operator]
        return super()._open(method, function, args, kwargs, False, None, batched)


class StandInModel(StandInEnvoy, NNsight):
    """The model in a runner: preparing, joining and running are done by the real one.

    Attributes:
        untold: why the model's own envoy classes are not there, "" where they are.
    """

    untold = ""

    def __init__(self, link: Link, description: list[Any]) -> None:
        self.__dict__["_link"] = link
        modules, mounted, locations, ends, names, helpers, _ = description
        self.__dict__.update({name: Helper(link, name, methods) for name, methods in helpers.items()})
        build(link, modules)
        self.__dict__["_naming"] = GivenNames(names, StandInEnvoy)
        super().__init__(link.modules["model"])
        for path in mounted:
            parent, _, name = path.rpartition(".")
            payload.envoy_at(self, parent).mount(name, link.modules[path])
        theirs = {(path, port): number for number, (path, port) in enumerate(locations)}
        for number, location in enumerate(self._tree.locations):
            found = theirs.get((location.path, location.port))
            if found is not None:
                link.theirs[number], link.ours[found] = found, number
        self._tree.ends[:] = [link.ours[number] for number in ends if number in link.ours]
        link.result = link.theirs[self._tree.result]

    @classmethod
    def described(cls, link: Link, description: list[Any]) -> StandInModel:
        """Return the stand-in of a model whose class has the traceable methods that the model's class has."""

        def runs(name: str) -> Callable[..., Any]:
            def method(self: Any, *prepared: Any) -> Any:
                return link.drive(self.path, name, *prepared)

            method.__name__ = name
            return traceable(method)

        kind: Any = type(cls.__name__, (cls,), {name: runs(name) for name in description[-1]})
        return cast("StandInModel", kind(link, description))

    def rows(self, tensor: torch.Tensor, batch: Any) -> slice | None:
        joint = batch.joint
        handles = [item.handle for item in joint.args]
        key = (tuple(tensor.shape), batch.start, batch.size, *handles)
        known = self.__dict__.setdefault("_rows_known", {})
        if key not in known:
            content = [list(tensor.shape), batch.start, batch.size, joint.total, handles]
            known[key] = self._link.ask(Kind.ROWS, content)[1]
        found: slice | None = known[key]
        return found


def build(link: Link, modules: list[Any]) -> None:
    """Make the stand-ins of a model, each with its children.

    Args:
        link: what they ask.
        modules: path, class name, children (name and path), training mode of each, and whether it is a container.
    """
    kinds: dict[tuple[str, bool], type[StandIn]] = {}
    for path, name, _, is_training, is_container in modules:
        kind = kinds.get((name, is_container))
        if kind is None:
            kind = kinds[name, is_container] = type(name, (StandInContainer if is_container else StandIn,), {})
        link.modules[path] = kind(link, path, is_training)
    for path, _, children, *_ in modules:
        for name, below in children:
            if below not in link.modules:
                raise FrameError(f"the model's description has no module {below}")
            link.modules[path]._modules[name] = link.modules[below]
