"""The model as a block sees it in a runner: a tree of stand-ins without weights, and a run that is told what happens.

Everything else is the ordinary library: the stand-in's forward asks the model's process where the real run stands, and
visits the same locations here. So tracers, invokes, steps, barriers and caches need nothing of their own.
"""

from __future__ import annotations

import array
import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from nnsight import Envoy, Interleaver, NNsight, current_run, payload, plugins, traceable
from nnsight.protocols import Elsewhere, Inputs
from nnsight_ndif.channel import Channel, Kind
from nnsight_ndif.errors import FrameError, NotInRunnerError
from nnsight_ndif.held import Held, contents
from nnsight_ndif.names import GivenNames
from nnsight_ndif.report import rebuild
from nnsight_ndif.served import modes_here
from nnsight_ndif.window import Window


class Link:
    """The runner's end of the conversation.

    Args:
        channel: to the model's process.
        incoming: the window that the model's end fills; `outgoing` the one it reads.
    """

    def __init__(self, channel: Channel, incoming: Window, outgoing: Window) -> None:
        self.channel = channel
        self.incoming, self.outgoing = incoming, outgoing
        self.modules: dict[str, StandIn] = {}
        self.held = Held(incoming, outgoing, lambda path: self.modules[path], self._pull)
        #: The model's numbers of locations, by those of the tree here, and the other way round.
        self.theirs: dict[int, int] = {}
        self.ours: dict[int, int] = {}
        #: The last number of the model's that is known.
        self.result = -1

    def ask(self, kind: Kind, content: Any) -> tuple[Kind, Any]:
        """Ask the model's process and wait for its answer.

        Raises:
            Exception: what the model, or answering, has raised there.
        """
        was_enabled = gc.isenabled()
        gc.disable()  # what is collected now would be taken there for held
        try:
            dropped, edits = self.held.begin()
            self.channel.send(kind, [dropped, edits, self.held.pack(content)])
            answer, data = self.channel.receive()
            self.incoming.begin()
            if answer is Kind.FAILED:
                raise rebuild(data)
            refreshed, content = data
            self.held.unpack(refreshed)
            return answer, self.held.unpack(content)
        finally:
            if was_enabled:
                gc.enable()

    def look_inside(self, path: str, steps: list[str], how: str) -> Any:
        """Return what the model's process tells of a function inside a forward."""
        return self.ask(Kind.SOURCE, [path, steps, how])[1]

    def place(self, theirs: int, size: int, ours: int) -> None:
        """Learn the numbers of locations, there and here."""
        for number in range(size):
            self.theirs[ours + number], self.ours[theirs + number] = theirs + number, ours + number

    def _pull(self, key: int, gradient: torch.Tensor) -> list[torch.Tensor | None]:
        with torch.no_grad():
            found: list[torch.Tensor | None] = self.ask(Kind.BACKWARD, [key, gradient])[1]
        return found

    def drive(self, path: str, method: str, *prepared: Any) -> Any:
        """Run the model there, and visit here what it visits. Called on the model side of a run."""
        run = current_run.get()
        assert run is not None
        handles = [item.handle for item in prepared if isinstance(item, Prepared)]
        answer, content = self.ask(Kind.OPEN, [path, method, handles, self._wanted(run), modes_here()])
        # Whatever becomes of the run here, the one there is closed with it.
        progress = [False]  # whether it has come to its end
        run.closing = [*run.closing, partial(self._close, progress)]
        while answer is Kind.VISIT:
            their_number, counts, value = content
            self._count(run, counts)
            number = self.ours[their_number]
            if their_number == self.result:
                run.counts[number] -= 1  # it counts its result itself
                progress[0] = True
                return value
            answer, content = self.ask(Kind.GO, self._pass(run, number, value))
        progress[0] = True
        self._count(run, content)
        return None

    def _close(self, progress: list[bool]) -> None:
        self.ask(Kind.CLOSE, progress[0])

    def _count(self, run: Interleaver, counts: bytes) -> None:
        """Let the counts of the run say what they say there."""
        for theirs, count in enumerate(array.array("i", counts)):
            ours = self.ours.get(theirs)
            if ours is not None:
                run.count(ours)
                run.counts[ours] = count

    def _pass(self, run: Interleaver, number: int, value: Any) -> list[Any]:
        """Visit a location, and return what has become of its value."""
        before = contents(value, [])
        run.counts[number] -= 1  # the visit counts itself
        new = run.visit(number, value)
        skipped = [] if run.skipped is None else [run.take_skipped(number)]
        after = contents(new, [])
        is_same = len(before) == len(after) and all(old is now for old, now in zip(before, after, strict=True))
        return [self._wanted(run), [] if is_same or skipped else [new], skipped]

    def _wanted(self, run: Interleaver) -> list[list[int]]:
        """Return the locations that blocks wait for, each with the next occurrence that anybody wants."""
        found: dict[int, int] = {}
        for number, entry in run.waiting.items():
            for mediator in entry if isinstance(entry, list) else [entry]:
                occurrence = mediator.occurrence if mediator.wanted is None else mediator.wanted[number]
                if number not in self.theirs:
                    raise NotInRunnerError(f"`{run.tree[number]}` is not a location that a block in a runner can read.")  # type: ignore[index]
                theirs = self.theirs[number]
                occurrence = max(occurrence, run.count(number))  # who takes every visit waits for the next
                found[theirs] = min(occurrence, found.get(theirs, occurrence))
        return [[number, occurrence] for number, occurrence in found.items()]


class Prepared:
    """An input that the model's process has prepared and keeps."""

    def __init__(self, handle: int) -> None:
        self.handle = handle


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
        kind = Kind.CALL if current_run.get() is None else Kind.HOOKED
        return self._link.ask(kind, [self._at, args, kwargs, modes_here()])[1]

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
            raise NotInRunnerError("`trace(fn=...)` runs a function of the caller's, which a runner does not have.")
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
        modules: path, class name, children (name and path) and training mode of each.
    """
    kinds: dict[str, type[StandIn]] = {}
    for path, name, _, is_training in modules:
        kind = kinds.get(name)
        if kind is None:
            kind = kinds[name] = type(name, (StandIn,), {})
        link.modules[path] = kind(link, path, is_training)
    for path, _, children, _ in modules:
        for name, below in children:
            if below not in link.modules:
                raise FrameError(f"the model's description has no module {below}")
            link.modules[path]._modules[name] = link.modules[below]
