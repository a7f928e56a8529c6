"""The mirror of a module: it turns `.output`, `.input`, `.inputs` and `.skip` into messages of the current block.

Wrapping changes nothing on a module. The root owns its envoys; a child holds its module strongly, its parent and root
weakly, so a model is freed without the cyclic collector.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from sys import _getframe
from types import MappingProxyType
from typing import Any, ClassVar, Self, overload

import torch
from torch import nn

from nnsight._words import Misspelt, nearest, refuse_slip
from nnsight.errors import NotInTreeError, OrphanError
from nnsight.kernel import display, growth
from nnsight.kernel.blocks import find, open_blocks, open_here, require
from nnsight.kernel.controller import Instrumentation
from nnsight.kernel.location import ROOT, Tree
from nnsight.kernel.mediator import Mediator
from nnsight.protocols import Naming

ORPHAN = (
    "The model that `{path}` belongs to is gone: an envoy does not keep its root alive. Keep the wrapper in a variable "
    "(`model = NNsight(net)`) for as long as you use its parts."
)


class Envoy:
    """Mirrors one module of a model.

    Attribute access gives child envoys, and otherwise what the module has. Values are there only inside a block.
    """

    __slots__ = ("__dict__", "__weakref__", "_kept_root")
    _module: nn.Module
    _path: str
    _tree: Tree
    _number: int
    _output_at: tuple[Tree, int]  # what the hot path needs, in one look-up: an envoy's attributes are slow to find
    _children: dict[str, Envoy]
    _aliases: Mapping[str, Envoy] = MappingProxyType({})
    _naming: Naming | None = None
    _own: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._own = frozenset(name for name in dir(cls) if not name.startswith("__"))

    # -- values --------------------------------------------------------------------------------------------------

    @property
    def output(self) -> Any:
        """What the module's caller gets from it, after the user's own hooks. Only inside a block."""
        try:
            # What `_seat` finds, for a request in the block's own frame, or in a comprehension or helper there.
            frame = _getframe(1)
            blocks = open_blocks.get(frame) or open_blocks.get(frame.f_back)  # type: ignore[arg-type]
            tree, number = self._output_at
            if blocks is not None and blocks[-1].tree is tree:
                return blocks[-1].read(number)
            block, number = self._seat("output")
            return block.read(number + 1)
        except BaseException as error:
            self._failed("output", error)
            raise

    @output.setter
    def output(self, value: Any) -> None:
        frame = _getframe(1)  # as above
        blocks = open_blocks.get(frame) or open_blocks.get(frame.f_back)  # type: ignore[arg-type]
        tree, number = self._output_at
        if blocks is not None and blocks[-1].tree is tree:
            blocks[-1].write(number, value)
        else:
            block, number = self._seat("output")
            block.write(number + 1, value)

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the module's caller passes them: `(args, kwargs)`. Only inside a block."""
        try:
            block, number = self._seat("inputs")
            return block.read(number)  # type: ignore[no-any-return]
        except BaseException as error:
            self._failed("inputs", error)
            raise

    @inputs.setter
    def inputs(self, value: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        try:
            args, kwargs = value
            checked = (tuple(args), dict(kwargs))
        except (TypeError, ValueError):
            raise TypeError(
                f"`{self._path}.inputs` takes (args, kwargs), a tuple and a dict; got {type(value).__name__}. To "
                "replace the first argument only, assign to `.input`."
            ) from None
        block, number = self._seat("inputs")
        block.write(number, checked)

    @property
    def input(self) -> Any:
        """The first argument passed to the module, positional or by keyword. Only inside a block."""
        try:
            block, number = self._seat("input")
            args, kwargs = block.read(number)
        except BaseException as error:
            self._failed("input", error)
            raise
        if args or kwargs:
            return args[0] if args else next(iter(kwargs.values()))
        raise ValueError(f"`{self._path}` was called without arguments, so it has no `.input`.")

    @input.setter
    def input(self, value: Any) -> None:
        block, number = self._seat("input")
        args, kwargs = block.read(number)
        is_positional = args or not kwargs
        new = ((value, *args[1:]), kwargs) if is_positional else (args, {**kwargs, next(iter(kwargs)): value})
        block.write(number, new)

    # What the value is called where a model's own child is named `output` or `input` (0.6 programs).
    nns_output, nns_input, nns_inputs = output, input, inputs

    def skip(self, value: Any) -> None:
        """Let the module return `value` without running. Only inside a block, before the module is entered.

        Args:
            value: what the caller gets: a tensor, or whatever the module would have returned.
        """
        block, number = self._seat("skip")
        block.skip(number, value)

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Call the module, anywhere; inside a block its own visit is not touched.

        Args:
            *args: for the module, as are the keyword arguments.
            hook: run it on the model side, so that blocks can read and change what happens in it.
        """
        if hook:
            return self._seat("a hooked call")[0].call(self._module, *args, **kwargs)
        return self._module(*args, **kwargs)

    def _seat(self, port: str) -> tuple[Mediator, int]:
        """Return the block that a request belongs to, and the number that its run has for this module's input."""
        mediator = find(self._tree, 3)  # this frame, the property's and find's own are not the user's
        if mediator is not None:
            return mediator, self._number
        for other in open_here():  # a module may have several wrappers: the one that is running counts
            number = other.run.number_of(self._module) if isinstance(other, Mediator) and other.run else None
            if number is not None:
                return other, number  # type: ignore[return-value]
        self._find_root()
        return require(self._tree, self._path, port), self._number

    # -- the tree ------------------------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """Where the module is, from the root `model`: `model.transformer.h.3`."""
        return self._path

    @property
    def parent(self) -> Envoy | None:
        """The envoy this one is a child of; None for the root."""
        return None if self._parent is None else self._parent()

    @property
    def root(self) -> Envoy:
        """The envoy of the whole model."""
        return self._find_root()

    @property
    def device(self) -> torch.device | None:
        """The device of the module's first parameter or buffer; None when it has none."""
        return next((tensor.device for tensor in _tensors(self._module)), None)

    @property
    def devices(self) -> set[torch.device]:
        """All devices that the module's parameters and buffers are on."""
        return {tensor.device for tensor in _tensors(self._module)}

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the module's first parameter; None when it has none."""
        return next((parameter.dtype for parameter in self._module.parameters()), None)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast the module in place, as `nn.Module.to` does; return this envoy."""
        self._module.to(*args, **kwargs)
        return self

    def cpu(self) -> Self:
        """Move the module to the CPU; return this envoy."""
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """Move the module to a GPU; return this envoy."""
        self._module.cuda(device)
        return self

    def named_modules(self) -> Iterator[tuple[str, Envoy]]:
        """Yield path and envoy of this module and all below it, each module once."""
        yield self._path, self
        for name, child in list(growth.children(self).items()):
            if child._path == f"{self._path}.{name}":  # else it is an alias of one that is elsewhere
                yield from child.named_modules()

    def modules(self, include_fn: Any = None, names: bool = False) -> list[Any]:
        """Return this envoy and all below it, each module once.

        Args:
            include_fn: keep only the envoys for which it returns something true.
            names: return (path, envoy) pairs.
        """
        found = [(path, envoy) for path, envoy in self.named_modules() if include_fn is None or include_fn(envoy)]
        return found if names else [envoy for _, envoy in found]

    def get(self, path: str) -> Any:
        """Return what a dotted path leads to from here: an envoy, or its `.output` and the like.

        Args:
            path: names and indices joined by dots; the root's own name `model` may be left out.

        Raises:
            NotInTreeError: a part of the path is neither a module nor an attribute; the nearest names are given.
        """
        names = path.split(".") if path else []
        if names and names[0] == ROOT and self._parent is None and ROOT not in self._children:
            is_root = ROOT not in self._aliases or names[1:2] == [] or names[1] in {**self._children, **self._aliases}
            names = names[1:] if is_root else names  # where an alias is `model`, too, what is below it counts
        found: Any = self
        for name in names:
            child = found._children.get(name) if isinstance(found, Envoy) else None
            found = child if child is not None else getattr(found, name)
        return found

    @overload
    def __getitem__(self, key: int | str) -> Envoy: ...
    @overload
    def __getitem__(self, key: slice) -> list[Envoy]: ...
    def __getitem__(self, key: int | str | slice) -> Envoy | list[Envoy]:
        child = self._children.get(name := str(key))
        if child is not None and child._module is self._module._modules.get(name):
            return child
        children = growth.children(self)
        found = children.get(name) or self._aliases.get(name)
        if found is not None:
            return found
        if isinstance(key, str):
            raise KeyError(f"`{self._path}` has no child {key!r}.{nearest(key, [*children, *self._aliases])}")
        try:
            return list(children.values())[key]
        except IndexError:
            raise IndexError(f"`{self._path}` has {len(children)} children, so there is no {key}.") from None

    def __iter__(self) -> Iterator[Envoy]:
        return iter(list(growth.children(self).values()))

    def __len__(self) -> int:
        return len(growth.children(self))

    def __bool__(self) -> bool:
        return True

    def __contains__(self, name: object) -> bool:
        return name in (children := growth.children(self)) or name in self._aliases or name in children.values()

    def __repr__(self) -> str:
        return display.show(self)

    def __dir__(self) -> list[str]:
        names = filter(str.isidentifier, (*self._children, *self._aliases))
        return sorted({*super().__dir__(), *dir(self._module), *names})

    # -- attributes of the module ----------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__
        kept = values.pop("_kept_error", None)
        if kept is not None and kept[0] == name:
            raise kept[1]  # a property raised it: asking the module instead would hide what happened
        module = values.get("_module")
        if module is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        own = getattr(type(self), name, None)
        if isinstance(own, property) and own.fget is not None:
            return own.fget(self)  # the getter failed with an AttributeError: let it say so itself
        child = module._modules.get(name)
        if child is not None:
            return growth.attach(self, name, child)
        try:
            return getattr(module, name)
        except AttributeError:
            found = self._lookup(name)
            if found is not None:
                return found
            told = f"`{self._path}` ({type(module).__name__}) has neither a module nor an attribute {name!r}."
            raise NotInTreeError(Misspelt(told, name, self)) from None

    def _lookup(self, name: str) -> Any:
        """Return what a name means that neither envoy nor module has; None for nothing."""
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        module = self.__dict__.get("_module")
        if module is None or name in self._own or (name.startswith("_") and not hasattr(module, name)):
            object.__setattr__(self, name, value)
        elif isinstance(value, Envoy):
            self.__setattr__(name, value._module)
        elif name in self._aliases:
            growth.assign(self._aliases[name], value)
        elif isinstance(value, nn.Module):
            setattr(module, name, value)
            growth.attach(self, name, value)
        elif name in self._children:
            setattr(module, name, value)
            growth.detach(self, name)
        elif name not in self.__dict__ and hasattr(module, name):
            setattr(module, name, value)
        else:
            if self._parent is not None and name not in self.__dict__ and find(self._tree) is not None:
                refuse_slip(self._path, type(self), name)
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._children:
            delattr(self._module, name)
            growth.detach(self, name)
        elif name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self._module, name)

    # -- building --------------------------------------------------------------------------------------------------

    _parent: weakref.ref[Envoy] | None
    _root: weakref.ref[Envoy]
    _kept_root: Envoy  # only where nobody else has the root: a part of an edited copy
    #: Only on the root: the envoy of every module, by `id`, and the controllers of the tree.
    _envoys: dict[int, Envoy]
    _instrumentation: Instrumentation
    #: Captured blocks that take part in every run of the tree, before the others.
    edits: list[Any]

    def _build(self, module: nn.Module) -> None:
        """Make this envoy the root of a new tree over `module`."""
        growth.build(self, module)

    def mount(self, name: str, module: nn.Module, ends_steps: bool = False) -> Envoy:
        """Give a module beside the model's own a place in the tree, such as what collects generated ids.

        The torch module is not touched, and the repr does not show it.

        Args:
            name: how it is reached from here.
            module: called by whoever drives the model, so that blocks can read what passes.
            ends_steps: whether it is called once the last step is over, so that open loops end there.
        """
        return growth.mount(self, name, module, ends_steps)

    def rebind(self, module: nn.Module) -> None:
        """Let the tree mirror another module of the same shape, such as the loaded model in place of an empty one.

        Args:
            module: the new module; a child that it lacks is forgotten, one that is new is added.
        """
        growth.rebind(self, module)

    def copy_wrapper(self) -> Self:
        """Return this envoy of a copy of the wrapper: other envoys and edits, the same modules and locations."""
        return growth.copy_wrapper(self)

    def _class_of(self, path: str, module: nn.Module) -> type[Envoy]:
        """Return the class of the envoy for one module below this root."""
        return Envoy

    def _find_root(self) -> Envoy:
        if (root := self._root()) is None:
            raise OrphanError(ORPHAN.format(path=self._path))
        return root

    def _failed(self, name: str, error: BaseException) -> None:
        """Take what a property raises; remember an AttributeError, for `__getattr__` to raise instead of its own."""
        if isinstance(error, AttributeError):
            self.__dict__["_kept_error"] = name, error


Envoy._own = frozenset(name for name in dir(Envoy) if not name.startswith("__"))


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
